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
from torchvision.models import resnet18

from cat_diffusion.cat_core.files import replacing
from comfyui import install, launch
from demo_model import world
from demo_model.world import SIZE, Painter, Pictures, World
from demo_model.world_sources import STYLES

_SEEN = 64  # pixels, side of what the judge looks at
_AROUND = 1.2  # of that, over the thing's longer side
_FIRST_SEED = 9_000_000  # of the judge's own pictures


@dataclass(frozen=True)
class NamingVerdict:
    """What the judge sees: (B,) each."""

    thing: np.ndarray
    style: np.ndarray


class NamingJudge(nn.Module):
    """Names the thing in the middle of a crop (B, 3, 64, 64) in [0, 1], and its style."""

    def __init__(self, names: int):
        super().__init__()
        self.names = names
        self.network = resnet18(num_classes=names + len(STYLES))

    def forward(self, crops: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, N) of names and (B, 3) of styles."""
        logits = self.network(2 * crops - 1)
        return logits[:, : self.names], logits[:, self.names :]


def crops(pictures: torch.Tensor, centres: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Squares (B, 3, 64, 64) of pictures (B, 3, S, S).

    Args:
        centres: (B, 2), x and y in [-1, 1].
        sizes: (B,), of the square's content, as a share of the picture's side.
    """
    theta = torch.zeros(len(pictures), 2, 3, device=pictures.device)
    theta[:, 0, 0] = _AROUND * sizes
    theta[:, 1, 1] = _AROUND * sizes
    theta[:, :, 2] = centres
    size = [len(pictures), 3, 2 * _SEEN, 2 * _SEEN]
    grid = F.affine_grid(theta, size, align_corners=False)
    large = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    return F.avg_pool2d(large, 2)


def of_holes(hole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Centre (B, 2) in [-1, 1] and longer side (B,) of the boxes of holes (B, 1, S, S)."""
    edges = []
    for axis in (2, 1):  # over rows: what is left are columns
        line = (hole[:, 0] > 0.5).any(3 - axis)
        first = line.float().argmax(1).float()
        last = SIZE - line.flip(1).float().argmax(1).float()
        edges.append((first, last))
    (left, right), (top, bottom) = edges
    centres = torch.stack((left + right, top + bottom), dim=1) / SIZE - 1
    return centres, torch.maximum(right - left, bottom - top) / SIZE


@torch.no_grad()
def judged(judge: NamingJudge, pictures: torch.Tensor, hole: torch.Tensor) -> NamingVerdict:
    """Look at what is in the holes (B, 1, S, S) of pictures (B, 3, S, S) in [0, 1]."""
    names, styles = judge(crops(pictures, *of_holes(hole)))
    return NamingVerdict(names.argmax(1).cpu().numpy(), styles.argmax(1).cpu().numpy())


def train(scenery: World, steps: int, batch_size: int) -> NamingJudge:
    """A new judge, of pictures on the photographs that training may use."""
    device = scenery.drawings.device
    torch.manual_seed(0)
    judge = NamingJudge(len(scenery.names)).to(device)
    painter = Painter(scenery, np.flatnonzero(~scenery.held_out), targets="any")
    optimiser = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    for step in range(steps):
        crop, thing, style = _examples(painter, batch_size, _FIRST_SEED + step)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            names, styles = judge(crop)
        loss = F.cross_entropy(names.float(), thing, label_smoothing=0.05)
        loss = loss + F.cross_entropy(styles.float(), style)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            right = (names.argmax(1) == thing).float().mean()
            print(f"judge {step + 1}: loss {loss.item():.3f}, right {right.item():.3f}", flush=True)
    return judge.eval()


@torch.no_grad()
def _examples(painter: Painter, count: int, seed: int) -> tuple:
    """Crops about targets, not quite in the middle, at times blurred as a VAE does."""
    pictures = painter.paint(count, seed)
    device = pictures.whole.device
    rng = np.random.default_rng(seed)
    hole = _some_hole(pictures, rng, seed)
    centres, sizes = of_holes(hole)
    jitter = torch.from_numpy(rng.normal(0, 0.04, (count, 2))).float().to(device)
    sizes = sizes * torch.from_numpy(rng.uniform(0.85, 1.15, count)).float().to(device)
    crop = crops(pictures.whole, centres + jitter, sizes)
    blurred = F.avg_pool2d(crop, 3, 1, 1)
    share = torch.from_numpy(rng.uniform(0, 1, (count, 1, 1, 1))).float().to(device)
    crop = torch.lerp(crop, blurred, share) + 0.02 * torch.randn_like(crop)
    gain = torch.from_numpy(rng.uniform(0.85, 1.15, (count, 3, 1, 1))).float().to(device)
    thing = pictures.things[:, 0].to(device)
    return (crop * gain).clamp(0, 1), thing, pictures.style.to(device)


def _some_hole(pictures: Pictures, rng: np.random.Generator, seed: int) -> torch.Tensor:
    if rng.random() < 0.5:
        return world.box_holes(pictures, rng)
    return world.blob_holes(pictures, seed)


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
    """Write a judge; its file holds nothing but tensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.cpu().contiguous() for key, tensor in judge.state_dict().items()}
    with replacing(path) as partial:
        save_file(tensors, partial)


def load(path: Path, names: int) -> NamingJudge:
    """Read a judge."""
    judge = NamingJudge(names)
    judge.load_state_dict(load_file(path))
    return judge.eval()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=Path, required=True, help="folder of things, photographs")
    parser.add_argument("--out", type=Path, default=default_path())
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch-size", type=int, default=128)
    arguments = parser.parse_args()
    device = "cuda" if launch.has_cuda() else "cpu"
    scenery = world.load(arguments.world).to(device)
    judge = train(scenery, arguments.steps, arguments.batch_size)
    names, styles = recognised(judge, scenery)
    save(judge, arguments.out)
    print(f"{arguments.out}: on held-out photographs {names:.1%} of names, {styles:.1%} of styles")
    return 0
