"""What CAT-Diffusion costs: time, memory and operations, measured in the real host."""
