"""Training batches drawn on the device that trains, for each of the demo model's stages.

A batch depends on its step and the seed alone.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from cat_diffusion.cat_core import preprocess
from cat_diffusion.cat_core.training.batches import DROPPED, TIMESTEPS
from cat_diffusion.cat_core.training.objectives import Batch
from demo_model.networks import LATENT_SCALE
from demo_model.world import (
    SIZE,
    Gallery,
    Painter,
    Pictures,
    blob_holes,
    box_holes,
    draw_once,
    random_holes,
    within,
)
from demo_model.world_texts import Texts, encode_texts

_CELL = 8  # pixels of a latent's cell
_GRID = 16  # CLIP's patches along a side
_PATCH = 14  # pixels of such a patch
_GREY = preprocess.GREY / 255
_LATENTS = ("latent", "masked_latent", "latent_mask")
_WINDOW = 16  # cells
_AWAY = 3  # cells that a window's middle may be off the hole's


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def clip_pixels(pictures: torch.Tensor, hole: torch.Tensor | None = None) -> torch.Tensor:
    """What CLIP sees of pictures (B, 3, S, S) in [0, 1]: (B, 3, 224, 224), normalised.

    As preprocess.clip_input, but by torch's bicubic filter, whose result is a few levels off.
    """
    pixels = _resized(pictures)
    if hole is not None:
        cover = _resized(hole)
        pixels = pixels * (1 - cover) + cover * _GREY
    mean = torch.tensor(preprocess.CLIP_MEAN, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(preprocess.CLIP_STD, device=pixels.device).view(3, 1, 1)
    return (pixels - mean) / std


def _resized(pictures: torch.Tensor) -> torch.Tensor:
    size = (preprocess.CLIP_SIZE, preprocess.CLIP_SIZE)
    small = F.interpolate(pictures, size, mode="bicubic", antialias=True, align_corners=False)
    return (small.clamp(0, 1) * 255).round() / 255


def patch_mask(hole: torch.Tensor) -> torch.Tensor:
    """(B, 1, 16, 16) int64, 1 = any pixel of the patch is masked, of holes (B, 1, S, S)."""
    hidden = (_resized(hole) >= 128 / 255).float()
    return F.max_pool2d(hidden, _PATCH).long()


class ClipBatches:
    """For WorldContrastive: pictures, the things in them and their captions."""

    def __init__(self, painter: Painter | Gallery, texts: Texts, batch_size: int, seed: int):
        self.painter = painter
        self.texts = texts
        self.batch_size = batch_size
        self.seed = seed

    @torch.no_grad()
    def __call__(self, step: int, positions: range) -> Batch:
        rng = np.random.default_rng([self.seed, step])
        pictures = self.painter.paint(self.batch_size, _seed(self.seed, step, 1))
        device = pictures.whole.device
        cover = F.adaptive_avg_pool2d(pictures.shown, _GRID).flatten(2)  # (B, K, 256)
        shows = (pictures.things.to(device) >= 0) & (cover.amax(2) > 0.3)
        captions = self.texts.captions(pictures.things.numpy(), pictures.style.numpy(), rng)
        batch = {
            "pixels": clip_pixels(pictures.whole),
            "caption": captions.to(device),
            "cover": cover,
            "thing": torch.where(shows, pictures.things.to(device), -1),
            "style": pictures.style.to(device),
        }
        return {key: value[positions.start : positions.stop] for key, value in batch.items()}


class VaeBatches:
    """For Reconstruction: pictures, a quarter of them with a black hole."""

    def __init__(self, painter: Painter | Gallery, batch_size: int, seed: int):
        self.painter = painter
        self.batch_size = batch_size
        self.seed = seed

    @torch.no_grad()
    def __call__(self, step: int, positions: range) -> Batch:
        rng = np.random.default_rng([self.seed, step])
        count = self.batch_size
        pictures = self.painter.paint(count, _seed(self.seed, step, 1))
        device = pictures.whole.device
        generator = torch.Generator(device).manual_seed(_seed(self.seed, step, 2))
        holed = torch.from_numpy(rng.random(count) < 0.25).to(device).view(-1, 1, 1, 1)
        hole = random_holes(count, _seed(self.seed, step, 3), device) * holed
        shape = (count, 4, SIZE // _CELL, SIZE // _CELL)
        batch = {
            "picture": 2 * pictures.whole * (1 - hole) - 1,
            "object": pictures.shown.sum(1, keepdim=True).clamp(0, 1) * (1 - hole),
            "noise": torch.randn(shape, device=device, generator=generator),
        }
        return {key: value[positions.start : positions.stop] for key, value in batch.items()}


class FrozenNetworks:
    """CLIP and VAE as plain modules on the device, in bf16 where it is a GPU."""

    def __init__(self, modules: dict[str, nn.Module], device: torch.device):
        self.device = device
        self.text = modules["clip_text"]
        self.vision = modules["clip_vision"]
        self.vae = modules["vae"]
        for module in (self.text, self.vision, self.vae):
            module.to(device).eval().requires_grad_(False)

    def _precision(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def image(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised pixels -> patch features (B, 256, D) and image feature (B, D)."""
        with self._precision():
            hidden = self.vision(pixels)[0].float()
        image = self.vision.vision_model.post_layernorm(hidden[:, 0])
        return hidden[:, 1:], image

    def latent(self, pictures: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) in [0, 1] -> scaled latents (B, 4, h, w)."""
        with self._precision():
            moments = self.vae.quant_conv(self.vae.encoder(2 * pictures - 1))
        return LATENT_SCALE * moments[:, :4].float()

    def contexts(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, 77) -> what cross-attention reads (B, 77, T), and pooled features (B, T)."""
        return encode_texts(self.text, tokens)


Draw = Callable[[int, int], Batch]  # (how many samples, seed) -> samples


class Pool:
    """Samples drawn and encoded once, kept on the device; noise is drawn anew for every batch.

    Args:
        draws: give a sample's tensors in parts; the same seed gives the same sample to all.
        folders: one for each of them, where they are kept as well, see world.draw_once.
    """

    def __init__(
        self,
        draws: Sequence[Draw],
        count: int,
        seed: int,
        at_once: int,
        folders: Sequence[Path | None],
    ):
        self.samples: Batch = {}
        for draw, folder in zip(draws, folders, strict=True):

            def encode(first: int, number: int, draw: Draw = draw) -> Batch:
                part = draw(number, _seed(seed, first))
                return {key: value.to(_small(value)) for key, value in part.items()}

            self.samples |= draw_once(encode, count, at_once, folder)

    def __len__(self):
        return len(next(iter(self.samples.values())))

    def rows(self, indices: torch.Tensor) -> Batch:
        """Samples in full precision again."""
        batch = {}
        for key, values in self.samples.items():
            taken = values[indices]
            batch[key] = taken.float() if taken.is_floating_point() else taken.long()
        return batch


def _small(value: torch.Tensor) -> torch.dtype:
    return torch.float16 if value.is_floating_point() else torch.int32


class PoolBatches:
    """Batches for Distillation and Diffusion out of a pool.

    Args:
        frozen: encodes the texts.
        empty: (1, 77), the tokens of no text.
        window: steps before this one see a part of the latents alone, 16x16 cells about the
            hole, which takes less than half of the time.
    """

    def __init__(
        self,
        pool: Pool,
        frozen: FrozenNetworks,
        empty: torch.Tensor,
        batch_size: int,
        seed: int,
        window: int = 0,
    ):
        self.pool = pool
        self.frozen = frozen
        self.window = window
        self.batch_size = batch_size
        self.seed = seed
        with torch.no_grad():
            self.empty_context, _ = frozen.contexts(empty.to(frozen.device))

    @torch.no_grad()
    def __call__(self, step: int, positions: range) -> Batch:
        device = self.frozen.device
        generator = torch.Generator(device).manual_seed(_seed(self.seed, step))
        count = self.batch_size
        indices = torch.randint(len(self.pool), (count,), device=device, generator=generator)
        batch = self.pool.rows(indices)
        tokens = batch.pop("tokens")
        context, batch["text"] = self.frozen.contexts(tokens)
        if "latent" in batch:
            if step < self.window:
                batch |= _around_holes(batch, generator)
            shape = batch["latent"].shape
            dropped = torch.rand(count, device=device, generator=generator) < DROPPED
            batch |= {
                "noise": torch.randn(shape, device=device, generator=generator),
                "timestep": _timesteps(count, device, generator),
                "dropped": dropped,
                "context": torch.where(dropped.view(-1, 1, 1), self.empty_context, context),
            }
        return {key: value[positions.start : positions.stop] for key, value in batch.items()}


def _timesteps(count: int, device: torch.device, generator: torch.Generator) -> torch.Tensor:
    """Timesteps (B,), the noisier the likelier: what is drawn is decided there."""
    place = torch.rand(count, device=device, generator=generator).sqrt()
    return (place * TIMESTEPS).long().clamp(max=TIMESTEPS - 1)


def _around_holes(batch: Batch, generator: torch.Generator) -> Batch:
    """Windows of a batch's latents, with the middle of the hole not far from theirs."""
    mask = batch["latent_mask"][:, 0]  # (B, h, w)
    room = mask.shape[1] - _WINDOW
    cells = torch.arange(mask.shape[1], device=mask.device)
    moves = torch.randint(
        -_AWAY, _AWAY + 1, (2, len(mask)), device=mask.device, generator=generator
    )
    firsts = []
    for axis in (2, 1):  # what is left after it: rows, columns
        line = mask.amax(axis).float()  # (B, h)
        middle = (line * cells).sum(1) / line.sum(1).clamp(min=1)
        first = middle.round().long() - _WINDOW // 2 + moves[axis - 1]
        firsts.append(first.clamp(0, room))
    rows, columns = firsts
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in _LATENTS}
    for number, (row, column) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)):
        for name in _LATENTS:
            whole = batch[name][number]
            parts[name].append(whole[:, row : row + _WINDOW, column : column + _WINDOW])
    return {name: torch.stack(values) for name, values in parts.items()}


class SampleDrawer:
    """Draws a pool's samples.

    `of_captions` for the base U-Net; `of_objects` and `seen` together for CAT's stages.
    """

    def __init__(self, painter: Painter | Gallery, texts: Texts, frozen: FrozenNetworks):
        self.painter = painter
        self.texts = texts
        self.frozen = frozen

    @torch.no_grad()
    def of_captions(self, count: int, seed: int) -> Batch:
        """As Stable Diffusion's inpainting was trained: holes anywhere, the picture's caption."""
        rng = np.random.default_rng(seed)
        pictures = self.painter.paint(count, _seed(seed, 1))
        device = pictures.whole.device
        hole = random_holes(count, _seed(seed, 2), device)
        about_target = torch.from_numpy(rng.random(count) < 0.6).to(device).view(-1, 1, 1, 1)
        hole = torch.where(about_target, self._holes(pictures, rng, seed), hole)
        tokens = self.texts.captions(pictures.things.numpy(), pictures.style.numpy(), rng)
        unseen = torch.zeros(count, _GRID**2, 1, device=device)  # there is no adapter to see it
        batch = self._latents(pictures.whole, hole, rng)
        return batch | {"tokens": tokens.to(device), "teacher_patches": unseen}

    @torch.no_grad()
    def of_objects(self, count: int, seed: int) -> Batch:
        """As CAT-Diffusion is trained: the hole is a thing's, the text its name."""
        rng = np.random.default_rng(seed)
        pictures = self.painter.paint(count, _seed(seed, 1))
        hole = self._holes(pictures, rng, seed)
        tokens = self.texts.labels(pictures.things[:, 0].numpy(), rng)
        batch = self._latents(within(pictures, hole), hole, rng)
        return batch | {"tokens": tokens.to(hole.device)}

    @torch.no_grad()
    def seen(self, count: int, seed: int) -> Batch:
        """What CLIP sees of the samples `of_objects`, with their hole and without."""
        rng = np.random.default_rng(seed)
        pictures = self.painter.paint(count, _seed(seed, 1))
        hole = self._holes(pictures, rng, seed)
        picture = within(pictures, hole)
        patches, image = self.frozen.image(clip_pixels(picture, hole))
        teacher_patches, teacher_image = self.frozen.image(clip_pixels(picture))
        return {
            "patches": patches,
            "image": image,
            "patch_mask": patch_mask(hole),
            "teacher_patches": teacher_patches,
            "teacher_image": teacher_image,
        }

    def _holes(self, pictures: Pictures, rng: np.random.Generator, seed: int) -> torch.Tensor:
        """Half boxes, half blobs."""
        is_box = torch.from_numpy(rng.random(len(pictures.whole)) < 0.5)
        is_box = is_box.to(pictures.whole.device).view(-1, 1, 1, 1)
        boxes = box_holes(pictures, rng)
        return torch.where(is_box, boxes, blob_holes(pictures, _seed(seed, 3)))

    def _latents(self, picture: torch.Tensor, hole: torch.Tensor, rng) -> Batch:
        # Where a cell at the edge counts as masked differs between training and use.
        threshold = torch.from_numpy(rng.uniform(0, 0.5, (len(hole), 1, 1, 1))).to(hole)
        return {
            "latent": self.frozen.latent(picture),
            "masked_latent": self.frozen.latent(picture * (1 - hole)),
            "latent_mask": (F.avg_pool2d(hole, _CELL) > threshold).long(),
        }
