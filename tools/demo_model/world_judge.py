"""The judge of the demo model's things: a network that shares nothing with the model it judges.

    python tools/run.py demo_model.world_judge --world FOLDER

It learns names and styles from pictures of its own and is kept in the cache.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, resnet18

from cat_diffusion.cat_core.files import replacing
from comfyui import install, launch
from demo_model import world
from demo_model.world import Painter, World
from demo_model.world_sources import STYLES

_SEEN = 64  # pixels, side of what the judge looks at
_WIDTHS = (32, 64, 128, 160)  # channels of the small network's layers
_AROUND = 1.2  # of that, over the thing's longer side
_KEPT = 112  # pixels, side of an example
_HOLE_SIZES = (0.95, 1.35)  # sides of holes, over their thing's
_LEAST = 0.12  # share of the square about a thing that it covers where one sees it
_AT_ONCE = 50  # pictures
_FIRST_SEED = 9_000_000  # of the judge's own pictures


@dataclass(frozen=True)
class NamingVerdict:
    """What the judge sees: (B,) each."""

    thing: np.ndarray
    style: np.ndarray


class NamingJudge(nn.Module):
    """Names the thing in the middle of a crop (B, 3, 64, 64) in [0, 1], and its style.

    Args:
        names: how many it knows.
        small: a network of 0.8 M parameters, for tests, instead of 11 M.
    """

    def __init__(self, names: int, small: bool = False):
        super().__init__()
        self.names = names
        classes = names + len(STYLES)
        self.network = _small_network(classes) if small else resnet18(num_classes=classes)

    def forward(self, crops: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, N) of names and (B, 3) of styles."""
        logits = self.network(2 * crops - 1)
        return logits[:, : self.names], logits[:, self.names :]


def _small_network(classes: int) -> nn.Module:
    layers: list[nn.Module] = []
    before = 3
    for width in _WIDTHS:
        shortcut = nn.Sequential(nn.Conv2d(before, width, 1, 2, bias=False), nn.BatchNorm2d(width))
        layers.append(BasicBlock(before, width, stride=2, downsample=shortcut))
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


def crops(
    pictures: torch.Tensor, centres: torch.Tensor, sizes: torch.Tensor, side: int = _SEEN
) -> torch.Tensor:
    """Squares (B, 3, side, side) of pictures (B, 3, S, S).

    Args:
        centres: (B, 2), x and y in [-1, 1].
        sizes: (B,), of the square's content, as a share of the picture's side.
    """
    theta = torch.zeros(len(pictures), 2, 3, device=pictures.device)
    theta[:, 0, 0] = _AROUND * sizes
    theta[:, 1, 1] = _AROUND * sizes
    theta[:, :, 2] = centres
    size = [len(pictures), 3, 2 * side, 2 * side]
    grid = F.affine_grid(theta, size, align_corners=False)
    large = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    return F.avg_pool2d(large, 2)


def of_holes(hole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Centre (B, 2) in [-1, 1] and longer side (B,) of the boxes of holes (B, 1, S, S)."""
    side = hole.shape[-1]
    edges = []
    for axis in (2, 1):  # over rows: what is left are columns
        line = (hole[:, 0] > 0.5).any(3 - axis)
        first = line.float().argmax(1).float()
        last = side - line.flip(1).float().argmax(1).float()
        edges.append((first, last))
    (left, right), (top, bottom) = edges
    centres = torch.stack((left + right, top + bottom), dim=1) / side - 1
    return centres, torch.maximum(right - left, bottom - top) / side


@torch.no_grad()
def judged(judge: NamingJudge, pictures: torch.Tensor, hole: torch.Tensor) -> NamingVerdict:
    """Look at what is in the holes (B, 1, S, S) of pictures (B, 3, S, S) in [0, 1]."""
    names, styles = judge(crops(pictures, *of_holes(hole)))
    return NamingVerdict(names.argmax(1).cpu().numpy(), styles.argmax(1).cpu().numpy())


@dataclass(frozen=True)
class Examples:
    """Things cut out of pictures, with something of what is around them.

    Attributes:
        picture: (N, 3, 112, 112) uint8; the thing's longer side takes the middle 64 pixels.
        thing, style: (N,) int64.
    """

    picture: torch.Tensor
    thing: torch.Tensor
    style: torch.Tensor


@torch.no_grad()
def examples(painter: Painter, pictures: int, folder: Path | None = None) -> Examples:
    """All things of some pictures that are mostly seen.

    Args:
        folder: keeps them, so that a stopped run goes on; see world.draw_once.
    """

    def cut(first: int, count: int) -> dict[str, torch.Tensor]:
        drawn = painter.paint(count, _FIRST_SEED + first)
        parts = []
        for slot in range(world.MOST_THINGS):
            shown = drawn.shown[:, slot : slot + 1]
            centres, sizes = of_holes(shown)
            part = crops(drawn.whole, centres, sizes * (_KEPT / _SEEN / _AROUND), _KEPT)
            enough = shown.mean((1, 2, 3)).cpu() > _LEAST * sizes.cpu() ** 2
            thing = torch.where(enough, drawn.things[:, slot], world.NO_THING)
            parts.append(((part * 255).round().to(torch.uint8).cpu(), thing))
        return {
            "picture": torch.stack([part for part, _ in parts], dim=1),  # (B, K, 3, h, w)
            "thing": torch.stack([thing for _, thing in parts], dim=1),
            "style": drawn.style[:, None].expand(-1, world.MOST_THINGS),
        }

    kept = world.draw_once(cut, pictures, _AT_ONCE, folder)
    there = kept["thing"] != world.NO_THING
    return Examples(kept["picture"][there], kept["thing"][there], kept["style"][there])


def train(
    judge: NamingJudge, seen: Examples, steps: int, batch_size: int, device: str
) -> NamingJudge:
    """The judge, on the device."""
    judge.to(device).train()
    optimiser = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    for step in range(steps):
        rng = np.random.default_rng([_FIRST_SEED, step])
        rows = torch.from_numpy(rng.integers(len(seen.thing), size=batch_size))
        crop = _varied(seen.picture[rows].to(device).float() / 255, rng)
        thing = seen.thing[rows].to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            named, styled = judge(crop)
        loss = F.cross_entropy(named.float(), thing, label_smoothing=0.05)
        loss = loss + F.cross_entropy(styled.float(), seen.style[rows].to(device))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            right = (named.argmax(1) == thing).float().mean()
            print(f"judge {step + 1}: loss {loss.item():.3f}, right {right.item():.3f}", flush=True)
    return judge.eval()


def _varied(pictures: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Examples as a hole may show them: not quite in the middle, at times blurred as by a VAE."""
    count = len(pictures)

    def numbers(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).float().to(pictures.device)

    sizes = rng.uniform(*_HOLE_SIZES, count) * _SEEN / _KEPT
    jitter = rng.normal(0, 0.05, (count, 2)) * sizes[:, None]
    crop = crops(pictures, numbers(jitter), numbers(sizes))
    mirrored = numbers(rng.random((count, 1, 1, 1)) < 0.5)
    crop = torch.lerp(crop, crop.flip(3), mirrored)
    share = numbers(rng.uniform(0, 1, (count, 1, 1, 1)))
    crop = torch.lerp(crop, F.avg_pool2d(crop, 3, 1, 1), share)
    crop = crop + 0.02 * numbers(rng.standard_normal(crop.shape))
    return (crop * numbers(rng.uniform(0.85, 1.15, (count, 3, 1, 1)))).clamp(0, 1)


def recognised(judge: NamingJudge, scenery: World, count: int = 500) -> tuple[float, float]:
    """Shares of true things on held-out photographs whose name and style the judge sees."""
    painter = Painter(scenery, np.flatnonzero(scenery.held_out), targets="any")
    right = []
    for seed in range(0, count, 50):
        pictures = painter.paint(50, _FIRST_SEED - 1 - seed)
        hole = world.box_holes(pictures, np.random.default_rng(seed))
        verdict = judged(judge, pictures.whole, hole)
        names = verdict.thing == pictures.things[:, 0].numpy()
        right.append((names.mean(), (verdict.style == pictures.style.numpy()).mean()))
    names, styles = np.mean(right, axis=0)
    return float(names), float(styles)


def default_path() -> Path:
    """Where the judge is kept."""
    return install.cache_dir() / "demo/world_judge.safetensors"


def save(judge: NamingJudge, path: Path) -> None:
    """Write a judge in fp16; its file holds nothing but tensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for key, tensor in judge.state_dict().items():
        tensors[key] = (tensor.half() if tensor.is_floating_point() else tensor).cpu().contiguous()
    with replacing(path) as partial:
        save_file(tensors, partial)


def load(path: Path, names: int) -> NamingJudge:
    """Read a judge, of either size."""
    tensors = load_file(path)
    judge = NamingJudge(names, small="network.conv1.weight" not in tensors)
    judge.load_state_dict(tensors)
    return judge.eval()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=Path, required=True, help="folder of things, photographs")
    parser.add_argument("--out", type=Path, default=default_path())
    parser.add_argument("--work", type=Path, help="keeps the examples, for a run that stops")
    parser.add_argument("--pictures", type=int, default=16_000, help="to paint and cut up")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--small", action="store_true", help="a small one, as the tests have it")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    arguments = parser.parse_args()
    launch.limit_threads(arguments.threads)
    device = "cuda" if launch.has_cuda() and not arguments.cpu else "cpu"
    scenery = world.load(arguments.world).to(device)
    painter = Painter(scenery, np.flatnonzero(~scenery.held_out), targets="any")
    seen = examples(painter, arguments.pictures, arguments.work)
    print(f"{len(seen.thing)} things in {arguments.pictures} pictures", flush=True)
    torch.manual_seed(0)
    judge = NamingJudge(len(scenery.names), arguments.small)
    train(judge, seen, arguments.steps, arguments.batch_size, device)
    names, styles = recognised(judge, scenery)
    save(judge, arguments.out)
    print(f"{arguments.out}: on held-out photographs {names:.1%} of names, {styles:.1%} of styles")
    return 0
