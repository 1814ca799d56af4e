"""The losses, as equations, next to the forward passes that they judge.

An objective is a module: called with a batch it returns, term by term, one number a sample. The loss of a global
batch is the sum over terms of  sum(numbers) / (sum(weights) + extra),  however the batch is split over processes and
accumulation steps; `weights` depend on the batch alone.
"""

from collections.abc import Callable

import torch
from torch import nn

from .. import features
from ..models.sem_inpainter import SemInpainter

Batch = dict[str, torch.Tensor]
Terms = dict[str, torch.Tensor]  # name -> (B,)


class Distillation(nn.Module):
    """Stage 1: SemInpainter learns the features that CLIP gives for the whole picture.

    Batch: patches (B, N, D), image (B, D), text (B, T), patch_mask (B, 1, G, G), and the teacher's
    teacher_patches (B, N, D), teacher_image (B, D).

    Args:
        masked: count the error of masked patches only, as the paper writes it. The official code counts all.
    """

    extra = {"patches": 1.0, "image": 0.0}

    def __init__(self, sem_inpainter: SemInpainter, masked: bool = False):
        super().__init__()
        self.sem_inpainter, self.masked = sem_inpainter, masked

    def weights(self, batch: Batch) -> Terms:
        return {
            "patches": batch["patch_mask"].flatten(1).sum(1).float(),
            "image": torch.ones(len(batch["patches"])),
        }

    def forward(self, batch: Batch) -> tuple[Terms, Terms]:
        """Loss terms, and what to watch: cosine similarity to the teacher over masked patches, before and after."""
        out = self.sem_inpainter(
            batch["patches"], batch["image"], batch["text"], batch["patch_mask"]
        )
        m = batch["patch_mask"].flatten(1).float()  # (B, N)
        error = (out.patches.float() - batch["teacher_patches"]).square().mean(2)  # (B, N)
        terms = {
            "patches": ((m * error) if self.masked else error).sum(1),
            "image": (out.image.float() - batch["teacher_image"]).square().mean(1),
        }
        watched = {
            name: masked_cosine(patches.detach(), batch["teacher_patches"], m)
            for name, patches in (
                ("cosine", out.patches.float()),
                ("cosine_observed", batch["patches"]),
            )
        }
        return terms, watched


class Diffusion(nn.Module):
    """Stages 2 and 3: the U-Net learns to remove noise while it looks at the visual prompt.

    Batch: latent, noise, masked_latent (B, 4, h, w), all scaled; latent_mask (B, 1, h, w); timestep (B,) int64;
    context (B, L, T). Without a SemInpainter also teacher_patches (B, N, D): the visual prompt is the whole picture's
    own features; or patches (B, N, D), those of the picture with its hole. With one, the inputs of SemInpainter (see
    Distillation): gradients flow through it.
    dropped (B,) bool: rows whose visual prompt is all zero (their context is expected to be the empty text's).

    Args:
        denoiser: (x (B, 9, h, w), timestep (B,), context (B, L, T), visual_prompt (B, N/4, D)) -> noise (B, 4, h, w).
        alphas_cumprod: (1000,) the noise schedule.
        sem_inpainter: None for stage 2.
        observed: without a SemInpainter, take the visual prompt from the picture with its hole.
    """

    extra = {"noise": 0.0}

    def __init__(
        self,
        denoiser: Callable,
        alphas_cumprod: torch.Tensor,
        sem_inpainter: SemInpainter | None = None,
        observed: bool = False,
    ):
        super().__init__()
        self.denoiser, self.sem_inpainter, self.observed = denoiser, sem_inpainter, observed
        self.register_buffer("alphas_cumprod", alphas_cumprod, persistent=False)

    def weights(self, batch: Batch) -> Terms:
        return {"noise": torch.ones(len(batch["latent"]))}

    def visual_prompt(self, batch: Batch) -> torch.Tensor:
        """(B, N/4, D), zero where dropped."""
        if self.sem_inpainter is None:
            patches = batch["patches" if self.observed else "teacher_patches"]
        else:
            out = self.sem_inpainter(
                batch["patches"], batch["image"], batch["text"], batch["patch_mask"]
            )
            patches = features.blend(out.patches, batch["patches"], batch["patch_mask"])
        prompt = features.pool(patches)
        return (
            prompt * (~batch["dropped"]).view(-1, 1, 1).to(prompt) if "dropped" in batch else prompt
        )

    def forward(self, batch: Batch) -> tuple[Terms, Terms]:
        noisy = add_noise(batch["latent"], batch["noise"], self.alphas_cumprod[batch["timestep"]])
        x = torch.cat((noisy, batch["latent_mask"], batch["masked_latent"]), dim=1)  # (B, 9, h, w)
        predicted = self.denoiser(x, batch["timestep"], batch["context"], self.visual_prompt(batch))
        return {"noise": (predicted.float() - batch["noise"]).square().mean((1, 2, 3))}, {}


def add_noise(
    latent: torch.Tensor, noise: torch.Tensor, alpha_cumprod: torch.Tensor
) -> torch.Tensor:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise; latent and noise (B, 4, h, w), alpha_cumprod (B,)."""
    a = alpha_cumprod.view(-1, 1, 1, 1)
    return a.sqrt() * latent + (1 - a).sqrt() * noise


def masked_cosine(patches: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean cosine similarity over masked patches: (B, N, D) x 2, (B, N) -> (B,); NaN for rows without a mask."""
    return (nn.functional.cosine_similarity(patches, teacher, dim=2) * mask).sum(1) / mask.sum(1)


def stable_diffusion_schedule() -> torch.Tensor:
    """alphas_cumprod (1000,) of Stable Diffusion 1.5, computed in float64, returned in float32."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float()
