"""A visual prompt as a picture: where the hole lies on CLIP's grid, and what its features say.

The features before and after SemInpainter are drawn as colours.
"""

import math
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch.nn import functional as F

from .. import preprocess
from ..features import VisualPrompt
from .captions import has_letters_of, shortened, write
from .tensors import channels_last, to_picture

SIDE = preprocess.CLIP_SIZE  # pixels of a panel
GAP = 8  # pixels between panels
# Four panels are shown some 260 pixels wide on a node, a quarter of their size.
FONT = 40  # pixels of the captions
TITLE = 52  # pixels of the line above the panels, in which they stand
_INK = (32, 32, 32)
_PAPER = (244, 244, 244)
_LINE = (255, 255, 255)
_HIDDEN = (226, 62, 62)  # cells of the hole

# What stands above the panels: short enough to be read there.
CAPTIONS = {
    "en": {"cells": "{hidden} of {all}", "before": "before", "after": "after"},
    "zh": {"cells": "{hidden}/{all}", "before": "补全前", "after": "补全后"},
}

Panel = tuple[str, Image.Image]  # a title and what is below it


def preview_rows(
    prompt: VisualPrompt, similarity: torch.Tensor | None = None, language: str = "en"
) -> torch.Tensor:
    """One row of panels for each visual prompt of a batch.

    The photo as CLIP saw it with its grid and the hidden cells, which are counted above; features
    before and after as colours, their first three principal components on axes common to both; and
    how similar each cell is to the text, with the least cosine and the greatest.

    Args:
        similarity: (B, G*G), cosines in [-1, 1]; the last panel is left out without it.
        language: of the captions: en, or zh where the machine has a font for it.
    Returns:
        (B, H, W, 3) float in [0, 1].
    """
    captions = CAPTIONS.get(language, CAPTIONS["en"])
    if not all(map(has_letters_of, captions.values())):
        captions = CAPTIONS["en"]
    rows = []
    for i in range(len(prompt.tokens)):
        cells = prompt.patch_mask[i, 0].bool().cpu()
        before, after = colours(prompt.before[i], prompt.after[i])
        panels = [
            (
                captions["cells"].format(hidden=int(cells.sum()), all=cells.numel()),
                _grid(prompt.picture[i], cells),
            ),
            (captions["before"], _outlined(_enlarged(before), cells)),
            (captions["after"], _outlined(_enlarged(after), cells)),
        ]
        if similarity is not None:
            panels.append(_similarity_panel(similarity[i].cpu(), cells))
        rows.append(_row(panels))
    return channels_last(rows)


def colours(before: torch.Tensor, after: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (N, D) x 2 -> colours (G, G, 3) x 2 in [0, 1].

    Equal features have equal colours in both. Directions of features count, not their lengths, of
    which a few are far larger than all others.
    """
    features = F.normalize(torch.cat((before, after)).float().cpu(), dim=1)  # (2N, D)
    centred = features - features.mean(0)
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:3]
    # The sign of a singular vector depends on the machine: its largest number becomes positive.
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    values = centred @ (axes * largest.sign()).T  # (2N, 3)
    low = values.quantile(0.02, dim=0)
    high = values.quantile(0.98, dim=0)
    values = ((values - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    if values.shape[1] < 3:
        values = F.pad(values, (0, 3 - values.shape[1]))
    side = math.isqrt(len(before))
    colours_before, colours_after = values.reshape(2, side, side, 3)
    return colours_before, colours_after


def _similarity_panel(cosines: torch.Tensor, cells: torch.Tensor) -> Panel:
    """(G*G,) -> a panel of greys: black is the least similar cell, white the most similar one."""
    low = cosines.min().item()
    high = cosines.max().item()
    grey = (cosines - low) / max(high - low, 1e-6)
    panel = _enlarged(grey.reshape(*cells.shape, 1).expand(-1, -1, 3))
    return f"{low:.2f} to {high:.2f}", _outlined(panel, cells)


def _enlarged(cells: torch.Tensor) -> Image.Image:
    """(G, G, 3) in [0, 1] -> a panel of plain squares."""
    return to_picture(cells).resize((SIDE, SIDE), Image.Resampling.NEAREST)


def _cell_box(x: int, y: int, grid: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom pixel of a cell, all of them inside it."""
    step = SIDE // grid
    left = x * step
    top = y * step
    return left, top, left + step - 1, top + step - 1


def _grid(picture: torch.Tensor, cells: torch.Tensor) -> Image.Image:
    """(3, S, S) uint8 -> a panel with grid lines and the hidden cells tinted."""
    panel = Image.fromarray(picture.permute(1, 2, 0).cpu().numpy())
    draw = ImageDraw.Draw(panel, "RGBA")
    for y, x in cells.nonzero().tolist():
        draw.rectangle(_cell_box(x, y, len(cells)), fill=(*_HIDDEN, 90))
    step = SIDE // len(cells)
    for place in range(step, SIDE, step):
        draw.line((place, 0, place, SIDE), fill=(*_LINE, 60))
        draw.line((0, place, SIDE, place), fill=(*_LINE, 60))
    return panel


def _outlined(panel: Image.Image, cells: torch.Tensor) -> Image.Image:
    """Draw the border of the hole."""
    draw = ImageDraw.Draw(panel)
    hidden = F.pad(cells, (1, 1, 1, 1)).tolist()  # [y + 1][x + 1] is the cell at x, y
    for y, x in cells.nonzero().tolist():
        left, top, right, bottom = _cell_box(x, y, len(cells))
        if not hidden[y][x + 1]:
            draw.line((left, top, right, top), fill=_LINE)
        if not hidden[y + 2][x + 1]:
            draw.line((left, bottom, right, bottom), fill=_LINE)
        if not hidden[y + 1][x]:
            draw.line((left, top, left, bottom), fill=_LINE)
        if not hidden[y + 1][x + 2]:
            draw.line((right, top, right, bottom), fill=_LINE)
    return panel


def _row(panels: Sequence[Panel]) -> Image.Image:
    """Panels side by side, each below its title."""
    size = (len(panels) * (SIDE + GAP) + GAP, SIDE + TITLE + GAP)
    row = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(row)
    for number, (title, panel) in enumerate(panels):
        x = GAP + number * (SIDE + GAP)
        write(draw, (x, 2), shortened(title, SIDE, FONT), FONT, fill=_INK)
        row.paste(panel, (x, TITLE))
    return row
