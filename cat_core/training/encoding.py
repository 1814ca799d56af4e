"""From a record's files to what the objectives read: pictures prepared, frozen networks run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image

from .. import features, preprocess
from ..data import masks
from ..data.crops import Chance, cropped
from ..data.manifest import Record
from .objectives import Batch
from .stages import LATENTS, PREDICTED, TAUGHT

# What one picture that CLIP sees gives.
OF_WHOLE = frozenset({"teacher_patches", "teacher_image", "whole_tokens"})
OF_SEEN = frozenset({"patches", "image", "observed_tokens"})
OF_SEQUENCES = frozenset({"teacher_patches", "whole_tokens", "patches", "observed_tokens"})

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

    def latent(self, image: torch.Tensor, hole: torch.Tensor | None = None) -> torch.Tensor:
        """The scaled latents (B, 4, h, w) of preprocess.vae_input_of_levels(image, hole).

        image (B, 3, H, W) and hole (B, 1, H, W) uint8.
        """
        ...


@dataclass(frozen=True)
class Preparation:
    """How samples are made of records."""

    objective: str = "diffusion"  # or distillation
    size: int = 512  # side of the picture that the VAE encodes, in pixels
    cell: int = 8  # pixels along one side of a latent cell
    pictures: str = "squash"  # one of stages.PICTURES
    flip: bool = False  # mirror half of the pictures; crops only
    # Share of the samples whose caption, where they have one, takes the label's place everywhere,
    # as in the official training. None: SemInpainter reads labels, the U-Net captions.
    caption_share: float | None = None
    reads: frozenset[str] | None = None  # keys of the batch; None: all, see `keys`

    @property
    def keys(self) -> frozenset[str]:
        """The keys of the batch that samples become."""
        if self.reads is not None:
            return self.reads
        return PREDICTED | TAUGHT | (LATENTS if self.objective == "diffusion" else frozenset())


def prepare(
    record: Record,
    folder: Path,
    variant: str,
    how: Preparation,
    chance: Chance,
) -> Sample:
    """Everything that the encoders see of one record, as far as it is read, in 8 bits.

    Args:
        folder: the manifest's.
        variant: how the hole is made of the object's mask, one of masks.VARIANTS.
    Raises:
        masks.SampleError: the files cannot be used.
    """
    picture, mask = masks.load(record, folder)
    if how.pictures == "crop":
        picture, hole = cropped(record, picture, mask, variant, chance, how.flip)
    else:
        hole = masks.training_mask(mask, variant)
    working_size = (masks.HOLE_SIZE, masks.HOLE_SIZE)
    picture_512 = picture.resize(working_size, Image.Resampling.BICUBIC)
    is_captioned = chance.caption < (how.caption_share or 0)
    prepared = {"captioned": torch.tensor(is_captioned)}
    if how.keys & (OF_WHOLE | OF_SEEN | {"patch_mask"}):
        seen = preprocess.clip_input_of_pictures(picture_512, hole)
        if how.keys & OF_WHOLE:
            prepared["whole"] = seen.image[0]
        if how.keys & OF_SEEN:
            prepared["seen"] = seen.masked_image[0]
        if "patch_mask" in how.keys:
            prepared["patch_mask"] = seen.patch_mask[0]
    if how.keys & (LATENTS - {"context"}):
        hole_at_size = hole.resize((how.size, how.size), Image.Resampling.BICUBIC)
        is_working_size = how.size == masks.HOLE_SIZE
        latent_mask = preprocess.levels_of(hole_at_size, how.size // how.cell) > 0
        prepared |= {
            "picture": preprocess.levels_of(picture_512 if is_working_size else picture, how.size),
            "hole": preprocess.levels_of(hole_at_size),
            "latent_mask": latent_mask.float(),
        }
    return prepared


def encode(records: Sequence[Record], inputs: Batch, encoders: Encoders, how: Preparation) -> Batch:
    """Run the frozen networks over samples made by `prepare`, stacked.

    The batch's keys are those that are read (see objectives.py).
    """
    holes = encode_holes(inputs, encoders, how)
    return holes | encode_whole(records, inputs, encoders, how)


def encode_holes(inputs: Batch, encoders: Encoders, how: Preparation) -> Batch:
    """What depends on the mask."""
    batch = {}
    if how.keys & OF_SEEN:
        patches, image = encoders.image(inputs["seen"])
        batch["patches"] = patches.float()
        batch["image"] = image.float()
        if "observed_tokens" in how.keys:
            batch["observed_tokens"] = features.pool(patches.float())
    if "masked_latent" in how.keys:
        batch["masked_latent"] = encoders.latent(inputs["picture"], inputs["hole"]).float()
    for key in ("patch_mask", "latent_mask"):
        if key in how.keys:
            batch[key] = inputs[key]
    return _read(batch, how)


def encode_whole(
    records: Sequence[Record], inputs: Batch, encoders: Encoders, how: Preparation
) -> Batch:
    """What does not depend on the mask."""
    batch = {}
    if how.keys & OF_WHOLE:
        patches, image = encoders.image(inputs["whole"])
        batch["teacher_patches"] = patches.float()
        batch["teacher_image"] = image.float()
        if "whole_tokens" in how.keys:
            batch["whole_tokens"] = features.pool(patches.float())
    names = []
    descriptions = []
    for record, is_captioned in zip(records, inputs["captioned"].tolist(), strict=True):
        name, description = _texts(record, is_captioned, how.caption_share is not None)
        names.append(name)
        descriptions.append(description)
    if "text" in how.keys:
        batch["text"] = encoders.text(names).float()
    if "context" in how.keys:
        batch["context"] = encoders.context(descriptions).float()
    if "latent" in how.keys:
        batch["latent"] = encoders.latent(inputs["picture"]).float()
    return _read(batch, how)


def _read(batch: Batch, how: Preparation) -> Batch:
    """What is read of a batch."""
    return {key: value for key, value in batch.items() if key in how.keys}


def _texts(record: Record, is_captioned: bool, is_one_text: bool) -> tuple[str, str]:
    """What SemInpainter and the U-Net read of a record."""
    label = record.label or record.caption or ""
    caption = record.caption or record.label or ""
    if not is_one_text:
        return label, caption
    text = caption if is_captioned else label
    return text, text


def stack(samples: Sequence[Sample]) -> Batch:
    """Samples of the same keys as one batch."""
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
