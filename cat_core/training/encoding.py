"""From a record's files to what the objectives read: pictures prepared, frozen networks run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from .. import preprocess
from ..data import masks
from ..data.manifest import Record
from ..pictures.tensors import channels_first
from .objectives import Batch

Sample = dict[str, torch.Tensor]  # one sample, without batch dimension


class Encoders(Protocol):
    """The frozen networks, supplied by a host.

    Pixels as in preprocess.py; everything returned is on the CPU.
    """

    def image(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, 224, 224) uint8 -> CLIP's patch features (B, N, D) and image feature (B, D)."""
        ...

    def text(self, texts: Sequence[str]) -> torch.Tensor:
        """-> CLIP's pooled text feature (B, T)."""
        ...

    def context(self, texts: Sequence[str]) -> torch.Tensor:
        """-> what the U-Net's cross-attention reads (B, 77, T)."""
        ...

    def latent(self, image: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] -> scaled latents (B, 4, h, w)."""
        ...


def prepare(record: Record, folder: Path, variant: str, size: int, cell: int) -> Sample:
    """Everything that the encoders see of one record.

    Args:
        folder: the manifest's.
        variant: how the hole is made of the object's mask, one of masks.VARIANTS.
        size: side of the picture that the VAE encodes, in pixels.
        cell: pixels along one side of a latent cell.
    Raises:
        masks.SampleError: the files cannot be used.
    """
    picture, mask = masks.load(record, folder)
    image = channels_first(picture)
    hole = channels_first(masks.training_mask(mask, variant))
    seen = preprocess.clip_input(image, hole)
    image_at_size = preprocess.resize(image, size, size) / 255
    hole_at_size = preprocess.resize(hole, size, size) / 255
    cells = size // cell
    prepared = {
        "whole": seen.image,
        "seen": seen.masked_image,
        "patch_mask": seen.patch_mask,
        "picture": preprocess.vae_input(image_at_size).float(),
        "masked_picture": preprocess.vae_input(image_at_size, hole_at_size).float(),
        "latent_mask": preprocess.latent_mask(hole_at_size, cells, cells, threshold=0),
    }
    return {key: value[0] for key, value in prepared.items()}


def encode(
    records: Sequence[Record], prepared: Sequence[Sample], encoders: Encoders, objective: str
) -> Batch:
    """Run the frozen networks over samples made by `prepare`.

    The batch's keys are what the objective, distillation or diffusion, wants (see objectives.py).
    """
    holes = encode_holes(prepared, encoders, objective)
    return holes | encode_whole(records, prepared, encoders, objective)


def encode_holes(prepared: Sequence[Sample], encoders: Encoders, objective: str) -> Batch:
    """What depends on the mask."""
    inputs = stack(prepared)
    patches, image = encoders.image(inputs["seen"])
    batch = {
        "patches": patches.float(),
        "image": image.float(),
        "patch_mask": inputs["patch_mask"],
    }
    if objective == "diffusion":
        batch["masked_latent"] = encoders.latent(inputs["masked_picture"]).float()
        batch["latent_mask"] = inputs["latent_mask"]
    return batch


def encode_whole(
    records: Sequence[Record], prepared: Sequence[Sample], encoders: Encoders, objective: str
) -> Batch:
    """What does not depend on the mask."""
    inputs = stack(prepared)
    patches, image = encoders.image(inputs["whole"])
    names = [record.label or record.caption or "" for record in records]
    batch = {
        "teacher_patches": patches,
        "teacher_image": image,
        "text": encoders.text(names),
    }
    if objective == "diffusion":
        descriptions = [record.caption or record.label or "" for record in records]
        batch["latent"] = encoders.latent(inputs["picture"])
        batch["context"] = encoders.context(descriptions)
    return {key: value.float() for key, value in batch.items()}


def stack(samples: Sequence[Sample]) -> Batch:
    """Samples of the same keys as one batch."""
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
