"""Holes in photographs for the demo model to fill; some of them are kept for the tests."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from demo_model import world

FIRST_SEED = 7_000_000  # of the test's pictures: neither the model's nor the judge's
_AT_ONCE = 25  # pictures
_LIST = "questions.json"


@dataclass(frozen=True)
class Question:
    """A hole to fill.

    Attributes:
        photograph: (S, S, 3) in [0, 1], with all things but the target.
        whole: (S, S, 3), with the target in the hole.
        hole: (S, S), 1 = repaint.
        thing: what belongs there.
        style: of the things around it.
        alone: there is nothing else whose style one could see.
    """

    photograph: torch.Tensor
    whole: torch.Tensor
    hole: torch.Tensor
    thing: int
    style: int
    alone: bool


def questions(
    scenery: world.World, count: int, kind: str, targets: str = "trained"
) -> list[Question]:
    """Holes, "box" or "blob", in photographs that no training saw; the same for the same count."""
    painter = world.Painter(scenery, np.flatnonzero(scenery.held_out), targets)
    asked: list[Question] = []
    for first in range(0, count, _AT_ONCE):
        seed = FIRST_SEED + first
        pictures = painter.paint(_AT_ONCE, seed)
        if kind == "box":
            holes = world.box_holes(pictures, np.random.default_rng(seed))
        else:
            holes = world.blob_holes(pictures, seed)
        whole = world.within(pictures, holes)
        for row in range(_AT_ONCE):
            asked.append(
                Question(
                    photograph=rearrange(pictures.without[row], "c h w -> h w c").cpu(),
                    whole=rearrange(whole[row], "c h w -> h w c").cpu(),
                    hole=holes[row, 0].cpu(),
                    thing=int(pictures.things[row, 0]),
                    style=int(pictures.style[row]),
                    alone=bool((pictures.things[row, 1:] < 0).all()),
                )
            )
    return asked[:count]


def keep(asked: Sequence[Question], names: Sequence[tuple[str, str]], folder: Path) -> None:
    """Write box holes so that they can be asked without the world."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = []
    for number, question in enumerate(asked):
        for kind in ("photograph", "whole"):
            levels = (getattr(question, kind) * 255).round().to(torch.uint8).numpy()
            path = folder / f"{number:02}_{kind}.jpg"
            Image.fromarray(levels).save(path, quality=92, subsampling=0)
        rows, columns = torch.nonzero(question.hole, as_tuple=True)
        box = [int(edge) for edge in (columns.min(), rows.min(), columns.max(), rows.max())]
        facts.append(
            {
                "box": box,
                "thing": question.thing,
                "style": question.style,
                "alone": question.alone,
            }
        )
    kept = {"names": names, "questions": facts}
    text = json.dumps(kept, ensure_ascii=False, indent=1)
    (folder / _LIST).write_text(text + "\n", encoding="utf-8")


def kept(folder: Path) -> tuple[list[Question], list[tuple[str, str]]]:
    """What `keep` has written: the holes, and the English and Chinese name of every thing."""
    facts = json.loads((folder / _LIST).read_text("utf-8"))
    asked = []
    for number, fact in enumerate(facts["questions"]):
        photograph = _read(folder / f"{number:02}_photograph.jpg")
        hole = torch.zeros(photograph.shape[:2])
        left, top, right, lower = fact.pop("box")
        hole[top : lower + 1, left : right + 1] = 1
        whole = _read(folder / f"{number:02}_whole.jpg")
        asked.append(Question(photograph=photograph, whole=whole, hole=hole, **fact))
    return asked, [(english, chinese) for english, chinese in facts["names"]]


def _read(path: Path) -> torch.Tensor:
    with Image.open(path) as file:
        return torch.from_numpy(np.array(file.convert("RGB"))).float() / 255
