"""The models of one checkpoint, and steps of their sampling through the host."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cat_diffusion.nodes.apply_ref_adapter import apply_ref_adapter
from cat_diffusion.nodes.conditioning import inpaint_conditioning
from cat_diffusion.nodes.host import model_files, sampling, symbols
from cat_diffusion.nodes.host.build import (
    build_cat_model,
    build_clip,
    build_clip_vision,
    build_unet,
    build_vae,
)
from cat_diffusion.nodes.host.unet import trained_sigmas
from cat_diffusion.nodes.visual_prompt import predict
from comfyui import ROOT

from .adapter_forms import OFFICIAL, PLAIN, SHIPPED, OfficialPatch
from .stopwatch import Stopwatch

CFG = 7.5
TEXT = "spoon"
PAPER_STEPS = 50
MIDDLE = 500  # of the 1000 noise levels that SD was trained on
GPU_REPEATS = 6  # of a step; the first one only warms up


class Bench(Stopwatch):
    """The forms that are compared, and timed calls of them."""

    def __init__(self, checkpoint: Path, size: int, rounds: int, cpu: bool):
        super().__init__(rounds, cuda=not cpu)
        file = model_files.read_path(checkpoint)
        self.model = build_unet(file)
        self.clip = build_clip(file)
        self.vae = build_vae(file)
        self.vision = build_clip_vision(file)
        self.cat_model = build_cat_model(file)
        self.prompt = self.see(*self.picture(size))
        self._conditioned: dict = {}

    def picture(self, size: int, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """IMAGE (B, S, S, 3) and MASK (B, S, S) of the demo's photograph."""
        photo = _levels(ROOT / "web/photograph/photo.jpg", "RGB", size)
        mask = _levels(ROOT / "web/photograph/mask.png", "L", size)
        return photo.repeat(batch, 1, 1, 1), mask.repeat(batch, 1, 1)

    def see(self, image: torch.Tensor, mask: torch.Tensor):
        """The visual prompt."""
        return predict(self.cat_model, self.vision, self.clip, image, mask, TEXT)

    def apply(self, prompt=None, model=None):
        """The model with RefAdapter as shipped."""
        return apply_ref_adapter(model or self.model, self.cat_model, prompt or self.prompt)

    def official(self, form: type[OfficialPatch] = OfficialPatch):
        """The model with RefAdapter as in the official code, or a form on the way from it."""
        model = self.model.clone()
        symbols.add_middle_patch(model, form(self.cat_model.ref_adapter, self.prompt.tokens))
        return model

    def forms(self) -> dict:
        """The models that are compared."""
        return {PLAIN: self.model, OFFICIAL: self.official(), SHIPPED: self.apply()}

    def conditioned(self, size: int, batch: int = 1) -> tuple:
        """Positive, negative and latent, as all forms get them; those of the last size are kept."""
        if (size, batch) not in self._conditioned:
            self.forget_conditioned()
            self._conditioned[size, batch] = inpaint_conditioning(
                sampling.encode_prompt(self.clip, TEXT),
                sampling.encode_prompt(self.clip, ""),
                self.vae,
                *self.picture(size, batch),
            )
        return self._conditioned[size, batch]

    def forget_conditioned(self) -> None:
        """Let the next call encode again."""
        self._conditioned.clear()

    def sample(
        self, model, sampler: Callable, sigmas: torch.Tensor, size: int, batch: int = 1
    ) -> torch.Tensor:
        """The host's sampling from seed 0 with a k-diffusion sampler function."""
        positive, negative, latent = self.conditioned(size, batch)
        return sampling.sample_on_sigmas(
            model,
            sampling.noise_for(latent["samples"]),
            sigmas,
            cfg=CFG,
            positive=positive,
            negative=negative,
            latent=latent["samples"],
            sampler=sampler,
        )

    def inside_sampling(
        self, model, use: Callable[[Callable], None], size: int, batch: int = 1
    ) -> None:
        """Let use(step) run inside the host's sampling; step() does one step, both rows of CFG."""

        def sampler(denoiser, x, sigmas, extra_args=None, callback=None, disable=None):
            def step():
                return denoiser(x, sigmas[:1].expand(len(x)), **extra_args)

            use(step)
            return x

        self.sample(model, sampler, trained_sigmas(self.model)[[MIDDLE, 0]], size, batch)

    def step_seconds(self, model, size: int, batch: int = 1) -> float:
        """Seconds of one step's work; on a GPU the least of several."""
        seconds = []

        def measure(step):
            for _ in range(GPU_REPEATS if self.cuda else 1):
                seconds.append(self.seconds(step))

        self.inside_sampling(model, measure, size, batch)
        return min(seconds[1:] or seconds)


def _levels(path: Path, mode: str, size: int) -> torch.Tensor:
    """A picture in [0, 1] as a batch of one."""
    picture = Image.open(path).convert(mode).resize((size, size))
    return torch.from_numpy(np.asarray(picture, np.float32) / 255)[None]
