"""An independent judge of inpainted scenes: a small convnet that tells shape and colour of the object in a hole.

    python tools/scene_classifier.py judge.safetensors

It has its own seeds (scenes.JUDGE, all shape-colour pairs) and shares no weights, features or data with the model
that it judges. Training degrades the pictures, so that blurry or noisy ones are judged by what they show.
"""

import argparse
import io
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from demo_model.scenes import COLOUR_NAMES, JUDGE, SHAPES, Scene, scene

CROP = 48  # pixels, side of what the classifier sees
BATCH = 128
REUSE = 8  # times each training scene is seen, turned and mirrored differently
UNSEEN = JUDGE[len(JUDGE) // 2 :]  # never trained on
_NAMES = {"shapes": " ".join(SHAPES), "colours": " ".join(COLOUR_NAMES)}


class SceneClassifier(nn.Module):
    """Three convolutions and a hidden layer, then a linear head each for shape and colour."""

    def __init__(self):
        super().__init__()
        widths, hidden = (3, 24, 48, 64), 64
        self.convolutions = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True)
                )
                for a, b in zip(widths, widths[1:])
            )
        )
        self.hidden = nn.Linear(widths[-1] * (CROP // 8) ** 2, hidden)
        self.shape = nn.Linear(hidden, len(SHAPES))
        self.colour = nn.Linear(hidden, len(COLOUR_NAMES))

    def forward(self, crops: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Crops (B, 3, 48, 48) in [0, 1] -> logits (B, 8) of shapes and of colours."""
        x = self.convolutions(crops * 4 - 2)  # (B, 64, 6, 6)
        x = self.hidden(x.flatten(1)).relu()  # (B, 64)
        return self.shape(x), self.colour(x)


@dataclass(frozen=True)
class Verdict:
    """What the classifier sees in B holes."""

    shape: np.ndarray  # (B,) int64, index into SHAPES
    colour: np.ndarray  # (B,) int64, index into COLOUR_NAMES
    shape_probability: np.ndarray  # (B,) float32 in [0, 1], of the shape named
    colour_probability: np.ndarray  # (B,) float32 in [0, 1], of the colour named


@torch.inference_mode()
def judge(model: SceneClassifier, images: np.ndarray, boxes: np.ndarray) -> Verdict:
    """Name shape and colour of the object in each box: images (B, S, S, 3) uint8, boxes (B, 4) fractions."""
    model.eval()
    crops = _tensor(
        [crop(Image.fromarray(image), box) for image, box in zip(images, boxes, strict=True)]
    )
    logits = [torch.cat(part) for part in zip(*(model(some) for some in crops.split(BATCH)))]
    (shape_p, shape), (colour_p, colour) = (part.softmax(dim=1).max(dim=1) for part in logits)
    return Verdict(*(part.numpy() for part in (shape, colour, shape_p, colour_p)))


def crop(picture: Image.Image, box: Iterable[float]) -> Image.Image:
    """The square around a box, 20 % larger than its longer side and moved inside the picture: 48x48."""
    side = picture.width
    if picture.height != side:
        raise ValueError(
            f"found a picture of {side}x{picture.height} pixels, expected a square one; "
            "judge scenes as they were made"
        )
    x0, y0, x1, y1 = (float(edge) * side for edge in box)
    length = min(max(1.2 * max(x1 - x0, y1 - y0), 2), side)
    x, y = (min(max((a + b - length) / 2, 0), side - length) for a, b in ((x0, x1), (y0, y1)))
    return picture.resize(
        (CROP, CROP), Image.Resampling.BILINEAR, box=(x, y, x + length, y + length)
    )


# Training ---------------------------------------------------------------------------------------------------------


def train(
    steps: int = 600, seed: int = 0, progress: bool = False
) -> tuple[SceneClassifier, list[float]]:
    """A trained classifier and its loss at each step."""
    generator = torch.Generator().manual_seed(seed)
    crops, targets = _examples(-(-steps * BATCH // REUSE), seed, progress)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SceneClassifier().train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    losses = []
    for step in range(1, steps + 1):
        chosen = torch.randint(len(crops), (BATCH,), generator=generator)
        shape, colour = model(_turned(crops[chosen].float() / 255, generator))
        loss = F.cross_entropy(shape, targets[chosen, 0]) + F.cross_entropy(
            colour, targets[chosen, 1]
        )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        if progress and (step % 100 == 0 or step == steps):
            end = "\n" if step == steps else ""
            print(f"\rstep {step}/{steps}, loss {np.mean(losses[-20:]):.4f}", end=end, flush=True)
    return model.eval(), losses


def _examples(count: int, seed: int, progress: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Degraded crops (N, 3, 48, 48) uint8 and their shape and colour (N, 2) int64."""
    rng = np.random.Generator(np.random.PCG64(seed))
    crops, targets = [], []
    for done, index in enumerate(rng.choice(len(JUDGE) - len(UNSEEN), count, replace=False), 1):
        example = scene(JUDGE[int(index)])
        crops.append(np.asarray(_degraded_crop(example, rng)))
        targets.append((SHAPES.index(example.shape), COLOUR_NAMES.index(example.colour)))
        if progress and (done % 1000 == 0 or done == count):
            print(f"\r{done}/{count} scenes", end="\n" if done == count else "", flush=True)
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous(), torch.tensor(targets)


def _degraded_crop(example: Scene, rng: np.random.Generator) -> Image.Image:
    """The crop around the target with blur, noise, JPEG artefacts and shift, as chance has it."""
    x0, y0, x1, y1 = example.box
    length = max(x1 - x0, y1 - y0)
    scale, dx, dy = rng.uniform(0.42, 0.56), *rng.uniform(-0.06, 0.06, 2) * length
    x, y = (x0 + x1) / 2 + dx, (y0 + y1) / 2 + dy
    box = np.array((x - scale * length, y - scale * length, x + scale * length, y + scale * length))
    # Degrade only what is needed: a square around the box with room for the blur, moved inside the picture.
    side = len(example.image)
    window = min(round(1.5 * length * side) + 8, side)
    left, top = (min(max(round(at * side - window / 2), 0), side - window) for at in (x, y))
    picture = _degraded(
        Image.fromarray(example.image[top : top + window, left : left + window]), rng
    )
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


def _turned(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A batch mirrored or not and turned by a multiple of 90 degrees; every shape keeps its name."""
    mirrored, turns = (
        torch.randint(2, (), generator=generator),
        torch.randint(4, (), generator=generator),
    )
    return torch.rot90(x.flip(3) if mirrored else x, int(turns), (2, 3))


def _tensor(crops: list[Image.Image]) -> torch.Tensor:
    """(B, 3, 48, 48) in [0, 1]."""
    return (
        torch.from_numpy(np.stack([np.asarray(picture) for picture in crops]))
        .permute(0, 3, 1, 2)
        .float()
        / 255
    )


# Files and accuracy -----------------------------------------------------------------------------------------------


def save(path: str | os.PathLike, model: SceneClassifier) -> None:
    """Write the weights as safetensors, with the names that the indices stand for."""
    save_file(model.state_dict(), path, metadata=_NAMES)


def load(path: str | os.PathLike) -> SceneClassifier:
    """Read what `save` wrote."""
    with safe_open(path, "pt") as file:
        names = file.metadata() or {}
        if any(names.get(key) != value for key, value in _NAMES.items()):
            raise ValueError(
                f"{path} tells {names.get('shapes', 'no shapes')} / {names.get('colours', 'no colours')}, "
                f"expected {_NAMES['shapes']} / {_NAMES['colours']}; train it again with this tool"
            )
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    model = SceneClassifier()
    model.load_state_dict(tensors)
    return model.eval()


def accuracy(model: SceneClassifier, seeds: Iterable[int], shrink: int = 1) -> tuple[float, float]:
    """Share of shapes and of colours told right, on pictures scaled down by `shrink` and up again."""
    scenes = [scene(seed) for seed in seeds]
    pictures = [Image.fromarray(s.image) for s in scenes]
    pictures = (
        [p.reduce(shrink).resize(p.size, Image.Resampling.BICUBIC) for p in pictures]
        if shrink > 1
        else pictures
    )
    verdict = judge(model, np.stack(pictures), np.array([s.box for s in scenes]))
    return (
        float(np.mean([SHAPES[i] == s.shape for i, s in zip(verdict.shape, scenes)])),
        float(np.mean([COLOUR_NAMES[i] == s.colour for i, s in zip(verdict.colour, scenes)])),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT.safetensors")
    arguments = parser.parse_args()
    torch.set_num_threads(
        1
    )  # on a busy machine two threads wait for each other and take twice as long
    start = time.monotonic()
    model, _ = train(progress=True)
    save(arguments.out, model)
    print(
        f"Trained {sum(p.numel() for p in model.parameters())} parameters in {time.monotonic() - start:.0f} s."
    )
    for shrink, title in ((1, "unseen scenes"), (2, "unseen scenes at half the resolution")):
        print(
            "{0}: {1:.2%} of shapes, {2:.2%} of colours right".format(
                title, *accuracy(model, UNSEEN[:2000], shrink)
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
