"""Blended Latent Diffusion as its authors' script for Stable Diffusion does it, with diffusers.

Avrahami et al. 2023, https://arxiv.org/abs/2206.02779; scripts/text_editing_SD2.py and
ldm/image_reconstruction.py of omriav/blended-latent-diffusion.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from cat_diffusion.cat_core.errors import CatError

from .local_methods import DTYPES, Request, folder_sha256, load_pipeline, model_folder
from .results_writer import GenerateError

STEPS = 50
GUIDANCE = 7.5
LEFT_OUT = 0.25  # of the steps, at the start
RATE = 1e-4  # of Adam, for the decoder's weights
PRESERVATION = 100  # how much more the background counts than the hole


class BlendedLatentMethod:
    """Stable Diffusion whose latents outside the hole are the photo's, noised anew at every step.

    In the end the decoder's weights are fitted to the photo's background and the picture's hole.

    Args:
        model: a folder or a name of Stable Diffusion with four channels.
        decoder_steps: of that fit; 75 as the authors have, 0 leaves it out.
    Raises:
        GenerateError: as DiffusersMethod; the model is another one.
    """

    def __init__(
        self,
        model: str,
        device: str,
        dtype: str,
        steps: int | None,
        guidance: float | None,
        decoder_steps: int,
    ):
        folder = model_folder(model)
        from diffusers import DDIMScheduler, StableDiffusionPipeline

        pipeline: Any = load_pipeline(StableDiffusionPipeline, model, folder, DTYPES[dtype])
        channels = pipeline.unet.config.in_channels
        if channels != pipeline.vae.config.latent_channels:
            raise GenerateError(
                f"{model} takes {channels} channels, so it is no plain Stable Diffusion; expected "
                f"{pipeline.vae.config.latent_channels}. Give SD 1.5, SD 2 or one made of them."
            )
        self.pipeline = pipeline.to(device)
        self.scheduler = DDIMScheduler.from_config(
            pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=False
        )
        self.place = device
        self.steps = steps or STEPS
        self.guidance = GUIDANCE if guidance is None else guidance
        self.decoder_steps = decoder_steps
        self.facts = {
            "method": "blended-latent",
            "method_sha256": folder_sha256(folder),
            "dtype": dtype,
            "steps": self.steps,
            "guidance": self.guidance,
            "decoder_steps": decoder_steps,
        }

    def __call__(self, requests: Sequence[Request]) -> list[Image.Image | CatError]:
        return [self._made(request) for request in requests]

    def _made(self, request: Request) -> Image.Image:
        vae = self.pipeline.vae
        photo = self._tensor(request.photo)  # (1, 3, H, W) in [-1, 1]
        with torch.no_grad():
            latents = self._sample(request, photo)
            decoded = vae.decode(latents / vae.config.scaling_factor).sample
        if self.decoder_steps:
            decoded = self._fitted(decoded, photo, request.hole)
        levels = (decoded[0].float() / 2 + 0.5).clamp(0, 1).mul(255).round().byte()
        return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())

    def _sample(self, request: Request, photo: torch.Tensor) -> torch.Tensor:
        """The latents at the end, (1, 4, h, w)."""
        vae = self.pipeline.vae
        source = vae.encode(photo).latent_dist.mean * vae.config.scaling_factor
        mask = self._mask(request.hole, source)
        text, empty = self.pipeline.encode_prompt(request.text, self.place, 1, True, "")
        context = torch.cat((empty, text))
        generator = request.generator

        def noise() -> torch.Tensor:
            return torch.randn(source.shape, generator=generator).to(source)

        self.scheduler.set_timesteps(self.steps)
        latents = noise()
        for t in self.scheduler.timesteps[int(self.steps * LEFT_OUT) :]:
            pair = torch.cat((latents, latents))
            unconditional, conditional = self.pipeline.unet(
                pair, t, encoder_hidden_states=context
            ).sample.chunk(2)
            guided = unconditional + self.guidance * (conditional - unconditional)
            latents = self.scheduler.step(guided, t, latents).prev_sample
            noised = self.scheduler.add_noise(source, noise(), t)
            latents = latents * mask + noised * (1 - mask)
        return latents

    def _fitted(self, made: torch.Tensor, photo: torch.Tensor, hole: Image.Image) -> torch.Tensor:
        """The picture by a decoder that was fitted to it in the hole, to the photo outside."""
        vae = self.pipeline.vae
        mask = torch.from_numpy(np.array(hole)).to(made).div(255)[None, None]
        with torch.no_grad():
            latents = vae.encode(made).latent_dist.mean
        kept = vae.decoder
        try:
            vae.decoder = copy.deepcopy(kept).requires_grad_(True)
            optimizer = torch.optim.Adam(vae.decoder.parameters(), RATE)
            with torch.enable_grad():
                for _ in range(self.decoder_steps):
                    fitted = vae.decode(latents).sample
                    inside = F.mse_loss(fitted * mask, made * mask)
                    outside = F.mse_loss(fitted * (1 - mask), photo * (1 - mask))
                    optimizer.zero_grad()
                    (inside + PRESERVATION * outside).backward()
                    optimizer.step()
            with torch.no_grad():
                return vae.decode(latents).sample
        finally:
            vae.decoder = kept

    def _tensor(self, picture: Image.Image) -> torch.Tensor:
        levels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
        return (levels.float() / 127.5 - 1).to(self.place, self.pipeline.vae.dtype)

    @staticmethod
    def _mask(hole: Image.Image, latents: torch.Tensor) -> torch.Tensor:
        """1 = repaint, at the latents' size: the nearest pixel's, as the authors take it."""
        height, width = latents.shape[-2:]
        small = np.array(hole.resize((width, height), Image.Resampling.NEAREST))
        return torch.from_numpy(small / 255 >= 0.5).to(latents)
