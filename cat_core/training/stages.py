"""The training stages as data: which modules train, at which rate, on which objective."""

from dataclasses import dataclass, replace

NEW = 1e-4  # the official learning rate of parts that start from nothing
PRETRAINED = 1e-5  # the official learning rate of parts that know something already

# Keys of a batch, see objectives.py.
PREDICTED = frozenset({"patches", "image", "text", "patch_mask"})  # what SemInpainter reads
TAUGHT = frozenset({"teacher_patches", "teacher_image"})  # and what it learns
LATENTS = frozenset({"latent", "masked_latent", "latent_mask", "context"})
PROMPTS = {
    None: frozenset(),
    "whole": frozenset({"whole_tokens"}),
    "observed": frozenset({"observed_tokens"}),
    "predicted": PREDICTED,
}

PICTURES = ("crop", "squash")  # how training pictures of any proportion become square: crops.py
CACHE_DTYPES = ("fp16", "int8")  # that a cache holds features of pictures in, the rest in fp16


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    `rates` maps a part (see weights.PREFIXES) to its learning rate; parts that are not in it are
    frozen.
    """

    name: str
    objective: str  # "distillation" or "diffusion"
    rates: tuple[tuple[str, float], ...]
    # The diffusion objective's visual prompt: CLIP's features of the "whole" picture, of the
    # "observed" one with its hole, those "predicted" by SemInpainter, or None for plain inpainting
    # without RefAdapter.
    prompt: str | None = "whole"

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that this stage trains."""
        return tuple(part for part, _ in self.rates)

    @property
    def reads(self) -> frozenset[str]:
        """The keys of a batch that the objective reads, but for what is drawn by chance."""
        if not self.diffusion:
            return TAUGHT | PREDICTED
        return LATENTS | PROMPTS[self.prompt]

    @property
    def diffusion(self) -> bool:
        """Whether the stage denoises latents, which takes U-Net and VAE."""
        return self.objective == "diffusion"

    def scaled(self, factor: float) -> "Stage":
        """The same stage with all rates times `factor`."""
        return replace(self, rates=tuple((part, rate * factor) for part, rate in self.rates))


_IN_ORDER = (
    Stage("sem-inpainter", "distillation", (("sem_inpainter", NEW),)),
    Stage("unet", "diffusion", (("unet", NEW),), prompt=None),
    Stage("ref-adapter", "diffusion", (("ref_adapter", NEW),)),
    Stage("ref-adapter-unet", "diffusion", (("ref_adapter", NEW), ("unet", PRETRAINED))),
    Stage("ref-adapter-lora", "diffusion", (("ref_adapter", NEW), ("unet_lora", NEW))),
    # The paper's ablation without SemInpainter.
    Stage(
        "ref-adapter-observed",
        "diffusion",
        (("ref_adapter", NEW), ("unet", PRETRAINED)),
        prompt="observed",
    ),
    Stage(
        "cascade-sem-inpainter",
        "diffusion",
        (("sem_inpainter", PRETRAINED),),
        prompt="predicted",
    ),
    Stage(
        "cascade",
        "diffusion",
        (("sem_inpainter", PRETRAINED), ("ref_adapter", PRETRAINED), ("unet", PRETRAINED)),
        prompt="predicted",
    ),
)

STAGES = {stage.name: stage for stage in _IN_ORDER}
