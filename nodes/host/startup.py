"""The host's settings where no main.py of it reads a command line: in tools and tests."""

import comfy.cli_args


def configure(cpu: bool) -> None:
    """Before anything else of the host is imported, which reads its settings then.

    PyTorch's attention is the fastest of the host's on a CPU. comfy/cli_args.py:171 (--cpu) and
    comfy/cli_args.py:149 (--use-pytorch-cross-attention).
    """
    settings = comfy.cli_args.args
    settings.cpu = cpu
    settings.use_pytorch_cross_attention = cpu
