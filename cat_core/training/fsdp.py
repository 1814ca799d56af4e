"""FSDP: each process keeps a piece of what is trained, of its gradients and of AdamW's states.

Checkpoints are whole, the same files as without it, so a run goes on either way. The step is that
of one process with all of it, see https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .settings import Settings, TrainingError


def refuse(settings: Settings, processes: int) -> None:
    """Raise TrainingError where FSDP cannot do what is asked for."""
    if not settings.fsdp:
        return
    if processes == 1:
        raise TrainingError(
            "--fsdp shares a run out among processes, and there is one. Start it with torchrun "
            "--nproc-per-node=N tools/train.py, or leave --fsdp out."
        )
    others = {
        "--use-8bit-adam": settings.use_8bit_adam,
        "--dynamo-backend": settings.dynamo_backend != "no",
        "--precision fp16": settings.precision == "fp16",
    }
    for option, is_given in others.items():
        if is_given:
            raise TrainingError(
                f"{option} does not work on the pieces that --fsdp makes. Leave one of the two out."
            )


def shard(objective: nn.Module, accelerator) -> None:
    """Leave a piece of each trained parameter in this process, and say so; others stay whole.

    All of it is put together for a step's forward and backward pass, and its gradients are then
    shared out.
    """
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
    except ImportError as error:
        raise TrainingError(
            f"--fsdp needs PyTorch 2.7 or newer, this is {torch.__version__} ({error})."
        ) from error
    objective.to(accelerator.device)
    frozen = {each for each in objective.parameters() if not each.requires_grad}
    fully_shard(
        objective,
        mesh=init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        reshard_after_forward=False,
        ignored_params=frozen,
    )
    count = 0
    own = 0
    for parameter in objective.parameters():
        if parameter.requires_grad:
            count += parameter.numel()
            own += parameter.to_local().numel()  # pyright: ignore - in pieces now
    name = f"Process {accelerator.process_index + 1} of {accelerator.num_processes}"
    # In one write: processes share the terminal.
    sys.stdout.write(f"{name}: keeps {own:,} of {count:,} numbers in training\n")
    sys.stdout.flush()


def is_sharded(objective: nn.Module) -> bool:
    """Whether `shard` has been called with it."""
    return hasattr(objective, "set_requires_gradient_sync")


def forget_whole(objective: nn.Module) -> None:
    """Leave the pieces alone, so that the next pass puts them together as they are then."""
    if is_sharded(objective):
        objective.reshard()  # pyright: ignore - FSDP's own


def whole(tree: Any, keep: bool = True) -> Any:
    """A state, with the pieces of all processes put together; all of them have to call this.

    Args:
        tree: tensors in mappings and lists, such as a state_dict.
        keep: give the result; where False, what was in pieces is None.
    """
    if isinstance(tree, Mapping):
        return {key: whole(value, keep) for key, value in tree.items()}
    if isinstance(tree, list):
        return [whole(value, keep) for value in tree]
    if not hasattr(tree, "full_tensor"):
        return tree
    # On the CPU, one after the other: together they may be more than a GPU has left.
    tensor = tree.full_tensor()
    return tensor.cpu() if keep else None


def piece(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This process's piece of `value`, where `parameter` is in pieces and of the same shape."""
    if not hasattr(parameter, "full_tensor") or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    own = value.to(parameter.device)
    return distribute_tensor(own, parameter.device_mesh, parameter.placements)
