"""What meets the official implementation: its checkpoints and its tensors."""
