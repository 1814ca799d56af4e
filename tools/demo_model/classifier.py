"""An independent judge of inpainted scenes: a small convnet that tells shape and colour in a hole.

    python tools/run.py demo_model.classifier judge.safetensors

It has its own seeds (scenes.JUDGE, all shape-colour pairs) and shares no weights, features or data
with the model that it judges. Training degrades the pictures, so that blurry or noisy ones are
judged by what they show.
"""

import argparse
import io
import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageFilter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from cat_diffusion.cat_core.pictures import tensors
from demo_model.scenes import COLOUR_NAMES, JUDGE, SHAPES, Scene, scene

CROP = 48  # pixels, side of what the classifier sees
BATCH = 128
REUSE = 8  # times each training scene is seen, turned and mirrored differently
RATE = 3e-3  # highest learning rate
UNSEEN = JUDGE[len(JUDGE) // 2 :]  # never trained on
_WIDTHS = (24, 48, 64)  # of the convolutions
_HIDDEN = 64
_NAMES = {"shapes": " ".join(SHAPES), "colours": " ".join(COLOUR_NAMES)}


class SceneClassifier(nn.Module):
    """Three convolutions and a hidden layer, then a linear head each for shape and colour."""

    def __init__(self):
        super().__init__()
        self.convolutions = nn.Sequential()
        before = 3
        for width in _WIDTHS:
            self.convolutions.append(_halving(before, width))
            before = width
        self.hidden = nn.Linear(before * (CROP // 8) ** 2, _HIDDEN)
        self.shape = nn.Linear(_HIDDEN, len(SHAPES))
        self.colour = nn.Linear(_HIDDEN, len(COLOUR_NAMES))

    def forward(self, crops: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Crops (B, 3, 48, 48) in [0, 1] -> logits (B, 8) of shapes and of colours."""
        x = self.convolutions(crops * 4 - 2)  # (B, 64, 6, 6)
        x = self.hidden(x.flatten(1)).relu()  # (B, 64)
        return self.shape(x), self.colour(x)


def _halving(before: int, width: int) -> nn.Module:
    """A convolution that halves height and width."""
    return nn.Sequential(
        nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    )


@dataclass(frozen=True)
class Verdict:
    """What the classifier sees in B holes."""

    shape: np.ndarray  # (B,) int64, index into SHAPES
    colour: np.ndarray  # (B,) int64, index into COLOUR_NAMES
    shape_probability: np.ndarray  # (B,) float32 in [0, 1], of the shape named
    colour_probability: np.ndarray  # (B,) float32 in [0, 1], of the colour named

    def names(self, hole: int) -> tuple[str, str]:
        """Shape and colour in one of the holes."""
        return SHAPES[self.shape[hole]], COLOUR_NAMES[self.colour[hole]]


@torch.inference_mode()
def judge(model: SceneClassifier, images: np.ndarray, boxes: np.ndarray) -> Verdict:
    """Name shape and colour of the object in each box.

    Args:
        images: (B, S, S, 3) uint8.
        boxes: (B, 4), fractions of the side.
    """
    model.eval()
    pictures = map(Image.fromarray, images)
    crops = [crop(picture, box) for picture, box in zip(pictures, boxes, strict=True)]
    shapes = []
    colours = []
    for batch in _tensor(crops).split(BATCH):
        shape_logits, colour_logits = model(batch)
        shapes.append(shape_logits)
        colours.append(colour_logits)
    shape_probability, shape = torch.cat(shapes).softmax(dim=1).max(dim=1)
    colour_probability, colour = torch.cat(colours).softmax(dim=1).max(dim=1)
    return Verdict(
        shape=shape.numpy(),
        colour=colour.numpy(),
        shape_probability=shape_probability.numpy(),
        colour_probability=colour_probability.numpy(),
    )


def crop(picture: Image.Image, box: Iterable[float]) -> Image.Image:
    """The square around a box, 20 % larger than its longer side and moved inside, as 48x48.

    Raises:
        ValueError: the picture is not square.
    """
    side = picture.width
    if picture.height != side:
        raise ValueError(
            f"found a picture of {side}x{picture.height} pixels, expected a square one; "
            "judge scenes as they were made"
        )
    x0, y0, x1, y1 = (float(edge) * side for edge in box)
    length = min(max(1.2 * max(x1 - x0, y1 - y0), 2), side)
    x = _inside((x0 + x1 - length) / 2, side - length)
    y = _inside((y0 + y1 - length) / 2, side - length)
    square = (x, y, x + length, y + length)
    return picture.resize((CROP, CROP), Image.Resampling.BILINEAR, box=square)


def _inside(start, last):
    """The start of a window, moved between 0 and `last`."""
    return min(max(start, 0), last)


def _tensor(crops: list[Image.Image]) -> torch.Tensor:
    """(B, 3, 48, 48) in [0, 1]."""
    return rearrange(tensors.channels_last(crops), "b h w c -> b c h w")


# Training -----------------------------------------------------------------------------------------


def train(
    steps: int = 600, seed: int = 0, progress: bool = False
) -> tuple[SceneClassifier, list[float]]:
    """A trained classifier and its loss at each step."""
    generator = torch.Generator().manual_seed(seed)
    crops, targets = _examples(math.ceil(steps * BATCH / REUSE), seed, progress)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SceneClassifier().train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)
    losses = []
    for step in range(1, steps + 1):
        chosen = torch.randint(len(crops), (BATCH,), generator=generator)
        shape, colour = model(_turned(crops[chosen].float() / 255, generator))
        shape_loss = F.cross_entropy(shape, targets[chosen, 0])
        colour_loss = F.cross_entropy(colour, targets[chosen, 1])
        loss = shape_loss + colour_loss
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        if progress and (step % 100 == 0 or step == steps):
            _show(f"step {step}/{steps}, loss {np.mean(losses[-20:]):.4f}", step == steps)
    return model.eval(), losses


def _examples(count: int, seed: int, progress: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Degraded crops (N, 3, 48, 48) uint8 and their shape and colour (N, 2) int64."""
    rng = np.random.Generator(np.random.PCG64(seed))
    chosen = rng.choice(len(JUDGE) - len(UNSEEN), count, replace=False)
    crops = []
    targets = []
    for done, index in enumerate(chosen, 1):
        example = scene(JUDGE[int(index)])
        crops.append(np.asarray(_degraded_crop(example, rng)))
        targets.append((SHAPES.index(example.shape), COLOUR_NAMES.index(example.colour)))
        if progress and (done % 1000 == 0 or done == count):
            _show(f"{done}/{count} scenes", done == count)
    levels = torch.from_numpy(np.stack(crops))
    return rearrange(levels, "n h w c -> n c h w").contiguous(), torch.tensor(targets)


def _show(progress: str, is_last: bool) -> None:
    print(f"\r{progress}", end="\n" if is_last else "", flush=True)


def _degraded_crop(example: Scene, rng: np.random.Generator) -> Image.Image:
    """The crop around the target with blur, noise, JPEG artefacts and shift, as chance has it."""
    x0, y0, x1, y1 = example.box
    length = max(x1 - x0, y1 - y0)
    reach = rng.uniform(0.42, 0.56) * length
    shift_x, shift_y = rng.uniform(-0.06, 0.06, 2) * length
    x = (x0 + x1) / 2 + shift_x
    y = (y0 + y1) / 2 + shift_y
    box = np.array((x - reach, y - reach, x + reach, y + reach))
    # Only what is needed is degraded: a square around the box with room for the blur, moved inside
    # the picture.
    side = len(example.image)
    window = min(round(1.5 * length * side) + 8, side)
    left = _inside(round(x * side - window / 2), side - window)
    top = _inside(round(y * side - window / 2), side - window)
    pixels = example.image[top : top + window, left : left + window]
    picture = _degraded(Image.fromarray(pixels), rng)
    return crop(picture, (box * side - (left, top, left, top)) / window)


def _degraded(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    if rng.random() < 0.3:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 2)))
    if rng.random() < 0.4:
        small = max(round(picture.width / rng.uniform(1.3, 3)), 8)
        shrunk = picture.resize((small, small), Image.Resampling.BILINEAR)
        picture = shrunk.resize(picture.size, Image.Resampling.BICUBIC)
    if rng.random() < 0.3:
        noise = rng.standard_normal((*picture.size, 3), np.float32) * rng.uniform(2, 18)
        picture = Image.fromarray((np.asarray(picture) + noise).clip(0, 255).astype(np.uint8))
    if rng.random() < 0.3:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=int(rng.integers(25, 90)))
        picture = Image.open(file)
    return picture


def _turned(crops: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A batch mirrored or not and turned by a multiple of 90 degrees: shapes keep their names."""
    is_mirrored = torch.randint(2, (), generator=generator)
    turns = torch.randint(4, (), generator=generator)
    if is_mirrored:
        crops = crops.flip(3)
    return torch.rot90(crops, int(turns), (2, 3))


# Files and accuracy -------------------------------------------------------------------------------


def save(path: str | os.PathLike, model: SceneClassifier) -> None:
    """Write the weights as safetensors, with the names that the indices stand for."""
    save_file(model.state_dict(), path, metadata=_NAMES)


def load(path: str | os.PathLike) -> SceneClassifier:
    """Read what `save` wrote.

    Raises:
        ValueError: the file was written for other shapes or colours.
    """
    with safe_open(path, "pt") as file:
        found = file.metadata() or {}
    shapes = found.get("shapes", "no shapes")
    colours = found.get("colours", "no colours")
    if (shapes, colours) != (_NAMES["shapes"], _NAMES["colours"]):
        raise ValueError(
            f"{path} tells {shapes} / {colours}, expected {_NAMES['shapes']} / "
            f"{_NAMES['colours']}; train it again with this tool"
        )
    model = SceneClassifier()
    model.load_state_dict(load_file(path))
    return model.eval()


def accuracy(model: SceneClassifier, seeds: Iterable[int], shrink: int = 1) -> tuple[float, float]:
    """Share of shapes and of colours told right, on pictures scaled down by `shrink` and up."""
    drawn = [scene(seed) for seed in seeds]
    images = []
    for example in drawn:
        picture = Image.fromarray(example.image)
        if shrink > 1:
            picture = picture.reduce(shrink).resize(picture.size, Image.Resampling.BICUBIC)
        images.append(np.asarray(picture))
    verdict = judge(model, np.stack(images), np.array([example.box for example in drawn]))
    shapes_right = 0
    colours_right = 0
    for hole, example in enumerate(drawn):
        shape, colour = verdict.names(hole)
        shapes_right += shape == example.shape
        colours_right += colour == example.colour
    return shapes_right / len(drawn), colours_right / len(drawn)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT.safetensors")
    arguments = parser.parse_args()
    # On a busy machine two threads wait for each other and take twice as long.
    torch.set_num_threads(1)
    start = time.monotonic()
    model, _ = train(progress=True)
    save(arguments.out, model)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"Trained {size} parameters in {time.monotonic() - start:.0f} s.")
    for shrink, title in ((1, "unseen scenes"), (2, "unseen scenes at half the resolution")):
        shapes, colours = accuracy(model, UNSEEN[:2000], shrink)
        print(f"{title}: {shapes:.2%} of shapes, {colours:.2%} of colours right")
    return 0
