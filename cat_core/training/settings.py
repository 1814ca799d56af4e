"""What a run is: its stage, its modules and their objective, its numbers, and where it is kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..config import Architecture
from ..errors import CatError
from ..weights.trained_stages import TrainedStage
from .objectives import Objective
from .stages import Stage


class TrainingError(CatError):
    """Training cannot go on; the message says why, what is safe, and what to do."""


@dataclass(frozen=True)
class Settings:
    """What a run does; the same settings resume it."""

    steps: int = 40_000  # the paper's
    batch_size: int = 128  # over all processes and accumulation steps, the paper's
    micro_batch_size: int = 8  # samples a process puts through the model at once
    warmup: int = 0  # steps over which the rates rise linearly
    # What is left of the rates at the end of their cosine decay; 1 = constant, as in the paper.
    final_rate: float = 1.0
    weight_decay: float = 0.01  # AdamW's default
    max_grad_norm: float = 0.0  # to which longer gradients are shortened; 0 = none, as in the paper
    ema_decay: float = 0.0  # of the weights' moving average, see average.py; 0 = none
    snr_gamma: float = 0.0  # see objectives.Diffusion; 0 = all timesteps weigh the same
    use_8bit_adam: bool = False  # bitsandbytes' AdamW, with states of a byte
    dynamo_backend: str = "no"  # what torch.compile compiles with, as accelerate names it
    fsdp: bool = False  # each process keeps a piece of what is trained, see fsdp.py
    precision: str = "no"  # "no" (fp32), "bf16" or "fp16"
    seed: int = 0
    save_every: int = 500
    keep: int = 2  # complete checkpoints, the latest ones
    keep_best: bool = False  # besides, that of the lowest validation loss
    patience: int = 0  # validations without a lower loss that end the run; 0 = none do
    report_to: str = ""  # one of trackers.TRACKERS, or none


@dataclass(frozen=True)
class TrainingRun:
    """One stage in training.

    Without a folder nothing is written, and the trained modules are the result; the fields after it
    are then of no use.
    """

    stage: Stage
    modules: Mapping[str, nn.Module]  # part name -> module, for all parts that the stage trains
    objective: Objective  # see objectives.py; holds the modules
    settings: Settings
    folder: Path | None = None  # for checkpoints and log
    # What the result follows from besides stage and settings, see identity.py; the same resumes it.
    identity: Mapping[str, Any] = field(default_factory=dict)
    architecture: Architecture = field(default_factory=Architecture)  # for the weights' headers
    provenance: str = ""
    licence: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)  # what a model card says of it
    earlier: Sequence[TrainedStage] = ()  # stages that trained the same parts before
