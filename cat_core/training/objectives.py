"""The losses, as equations, next to the forward passes that they judge.

An objective is a module: called with a batch it returns, term by term, one number a sample. The
loss of a global batch is the sum over terms of  sum(numbers) / (sum(weights) + extra),  however the
batch is split over processes and accumulation steps; `weights` depend on the batch alone.
"""

from collections.abc import Callable, Mapping
from typing import ClassVar, Protocol

import torch
from torch import nn

from .. import features
from ..models.sem_inpainter import SemInpainter

Batch = dict[str, torch.Tensor]
Terms = dict[str, torch.Tensor]  # name -> (B,)


class Objective(Protocol):
    """What the loop asks of an objective, which is a module besides."""

    extra: ClassVar[Mapping[str, float]]  # by term, what is added to the total weight

    def weights(self, batch: Batch) -> Terms:
        """What each sample weighs in each term."""
        ...

    def __call__(self, batch: Batch) -> tuple[Terms, Terms]:
        """The loss terms, and figures that are only watched."""
        ...


class Distillation(nn.Module):
    """Stage 1: SemInpainter learns the features that CLIP gives for the whole picture.

    Batch: patches (B, N, D), image (B, D), text (B, T), patch_mask (B, 1, G, G), and the teacher's
    teacher_patches (B, N, D), teacher_image (B, D).

    Args:
        masked: count the error of masked patches only, as the paper writes it. The official code
            counts all.
    """

    extra: ClassVar[Mapping[str, float]] = {"patches": 1.0, "image": 0.0}

    def __init__(self, sem_inpainter: SemInpainter, masked: bool = False):
        super().__init__()
        self.sem_inpainter = sem_inpainter
        self.masked = masked

    def weights(self, batch: Batch) -> Terms:
        return {
            "patches": batch["patch_mask"].flatten(1).sum(1).float(),
            "image": torch.ones(len(batch["patches"])),
        }

    def forward(self, batch: Batch) -> tuple[Terms, Terms]:
        """Loss terms, and what to watch.

        That is the cosine similarity to the teacher over masked patches, before and after.
        """
        prediction = self.sem_inpainter(
            batch["patches"], batch["image"], batch["text"], batch["patch_mask"]
        )
        patches = prediction.patches.float()  # (B, N, D)
        image = prediction.image.float()  # (B, D)
        teacher = batch["teacher_patches"]
        hole = batch["patch_mask"].flatten(1).float()  # (B, N)

        error = (patches - teacher).square().mean(2)  # (B, N)
        counted = hole * error if self.masked else error
        terms = {
            "patches": counted.sum(1),
            "image": (image - batch["teacher_image"]).square().mean(1),
        }
        watched = {
            "cosine": features.masked_cosine(patches.detach(), teacher, hole),
            "cosine_observed": features.masked_cosine(batch["patches"], teacher, hole),
        }
        return terms, watched


class Diffusion(nn.Module):
    """Stages 2 and 3: the U-Net learns to remove noise while it looks at the visual prompt.

    Batch: latent, noise, masked_latent (B, 4, h, w), all scaled; latent_mask (B, 1, h, w); timestep
    (B,) int64; context (B, L, T). Without a SemInpainter also the visual prompt, whole_tokens or
    observed_tokens (B, N/4, D), or what it is pooled of: teacher_patches (B, N, D), the whole
    picture's own features, or patches (B, N, D), those of the picture with its hole. With one, the
    inputs of SemInpainter (see Distillation): gradients flow through it. dropped (B,) bool: rows
    whose visual prompt is all zero (their context is expected to be the empty text's).

    Args:
        denoiser: (x (B, 9, h, w), timestep (B,), context (B, L, T), visual_prompt (B, N/4, D)) ->
            noise (B, 4, h, w).
        alphas_cumprod: (1000,) the noise schedule.
        sem_inpainter: None for stage 2.
        observed: without a SemInpainter, take the visual prompt from the picture with its hole.
        snr_gamma: weigh a sample's error by min(snr, gamma) / snr of its timestep, so that steps
            with little noise do not outweigh the others (arXiv 2303.09556, for noise prediction);
            0 = all weigh the same.
        prompted: False where the denoiser looks at no visual prompt: it gets None.
    """

    extra: ClassVar[Mapping[str, float]] = {"noise": 0.0}
    alphas_cumprod: torch.Tensor

    def __init__(
        self,
        denoiser: Callable,
        alphas_cumprod: torch.Tensor,
        sem_inpainter: SemInpainter | None = None,
        observed: bool = False,
        snr_gamma: float = 0.0,
        prompted: bool = True,
    ):
        super().__init__()
        self.denoiser = denoiser
        self.snr_gamma = snr_gamma
        self.sem_inpainter = sem_inpainter
        self.observed = observed
        self.prompted = prompted
        self.register_buffer("alphas_cumprod", alphas_cumprod, persistent=False)

    def weights(self, batch: Batch) -> Terms:
        return {"noise": torch.ones(len(batch["latent"]))}

    def visual_prompt(self, batch: Batch) -> torch.Tensor | None:
        """(B, N/4, D), zero where dropped."""
        if not self.prompted:
            return None
        tokens = "observed_tokens" if self.observed else "whole_tokens"
        if self.sem_inpainter is None and tokens in batch:
            prompt = batch[tokens]
        else:
            prompt = features.pool(self._patches(batch))
        if "dropped" not in batch:
            return prompt
        kept = (~batch["dropped"]).view(-1, 1, 1)
        return prompt * kept.to(prompt)

    def _patches(self, batch: Batch) -> torch.Tensor:
        """The features that the visual prompt shows, (B, N, D)."""
        if self.sem_inpainter is None:
            return batch["patches"] if self.observed else batch["teacher_patches"]
        prediction = self.sem_inpainter(
            batch["patches"], batch["image"], batch["text"], batch["patch_mask"]
        )
        return features.blend(prediction.patches, batch["patches"], batch["patch_mask"])

    def forward(self, batch: Batch) -> tuple[Terms, Terms]:
        """The loss term; there is nothing to watch."""
        noisy = add_noise(batch["latent"], batch["noise"], self.alphas_cumprod[batch["timestep"]])
        x = torch.cat((noisy, batch["latent_mask"], batch["masked_latent"]), dim=1)  # (B, 9, h, w)
        predicted = self.denoiser(x, batch["timestep"], batch["context"], self.visual_prompt(batch))
        error = (predicted.float() - batch["noise"]).square().mean((1, 2, 3))  # (B,)
        if self.snr_gamma:
            error = error * snr_weight(self.alphas_cumprod[batch["timestep"]], self.snr_gamma)
        return {"noise": error}, {}


def combine(objective: Objective, terms: Terms, totals: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A part's share of the global batch's loss.

    The sum over terms of sum(numbers) / (total weight + extra).
    """
    loss = torch.zeros(())
    for name, numbers in terms.items():
        loss = loss + numbers.sum() / (totals[name] + objective.extra[name])
    return loss


def add_noise(
    latent: torch.Tensor, noise: torch.Tensor, alpha_cumprod: torch.Tensor
) -> torch.Tensor:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise.

    latent and noise (B, 4, h, w), alpha_cumprod (B,).
    """
    a = alpha_cumprod.view(-1, 1, 1, 1)
    return a.sqrt() * latent + (1 - a).sqrt() * noise


def snr_weight(alpha_cumprod: torch.Tensor, gamma: float) -> torch.Tensor:
    """min(snr, gamma) / snr with snr = a_t / (1 - a_t): (B,) -> (B,) in (0, 1]."""
    snr = alpha_cumprod / (1 - alpha_cumprod)
    return snr.clamp(max=gamma) / snr


def stable_diffusion_schedule() -> torch.Tensor:
    """alphas_cumprod (1000,) of Stable Diffusion 1.5, computed in float64, returned in float32."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float()
