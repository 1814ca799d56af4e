"""The training stages as data: which modules train, at which rate, on which objective."""

from dataclasses import dataclass

NEW, PRETRAINED = 1e-4, 1e-5  # the official learning rates


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    `rates` maps a part (see weights.PREFIXES) to its learning rate; parts that are not in it are frozen.
    """

    name: str
    objective: str  # "distillation" or "diffusion"
    rates: tuple[tuple[str, float], ...]
    uses_sem_inpainter: bool = False  # whether the diffusion objective's visual prompt comes from SemInpainter


STAGES = {
    stage.name: stage
    for stage in (
        Stage("sem-inpainter", "distillation", (("sem_inpainter", NEW),)),
        Stage("ref-adapter", "diffusion", (("ref_adapter", NEW),)),
        Stage("ref-adapter-unet", "diffusion", (("ref_adapter", NEW), ("unet", PRETRAINED))),
        Stage("cascade-sem-inpainter", "diffusion", (("sem_inpainter", PRETRAINED),), uses_sem_inpainter=True),
        Stage("cascade", "diffusion", (("sem_inpainter", PRETRAINED), ("ref_adapter", PRETRAINED), ("unet", PRETRAINED)),
              uses_sem_inpainter=True),
    )
}
