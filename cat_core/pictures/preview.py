"""A visual prompt as a picture: where the hole lies on CLIP's grid, and what its features say before and after."""

import math

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.nn import functional as F

from .. import preprocess
from ..features import VisualPrompt

SIDE = preprocess.CLIP_SIZE  # pixels of a panel
GAP, TITLE = 8, 18  # pixels between panels, and of the line above them
_INK, _PAPER, _LINE = (32, 32, 32), (244, 244, 244), (255, 255, 255)
_HIDDEN = (226, 62, 62)  # cells of the hole


def sheet(prompt: VisualPrompt, similarity: torch.Tensor | None = None) -> torch.Tensor:
    """One row of panels for each visual prompt of a batch.

    The photo as CLIP saw it with its grid and the hidden cells; features before and after as colours, their first three
    principal components on axes common to both; and how similar each cell is to the text.

    Args:
        similarity: (B, G*G), cosines in [-1, 1]; the last panel is left out without it.
    Returns:
        (B, H, W, 3) float in [0, 1].
    """
    rows = []
    for i in range(len(prompt.tokens)):
        cells = prompt.patch_mask[i, 0].bool().cpu()
        before, after = colours(prompt.before[i], prompt.after[i])
        panels = [
            (
                f"{int(cells.sum())} of {cells.numel()} cells hidden",
                _grid(prompt.picture[i], cells),
            ),
            ("features before", _outlined(_enlarged(before), cells)),
            ("features after", _outlined(_enlarged(after), cells)),
        ]
        if similarity is not None:
            low, high = similarity[i].min().item(), similarity[i].max().item()
            grey = (similarity[i].cpu() - low) / max(high - low, 1e-6)
            panels.append(
                (
                    f'"{prompt.text}": {low:.2f} black, {high:.2f} white',
                    _outlined(_enlarged(grey.reshape(*cells.shape, 1).expand(-1, -1, 3)), cells),
                )
            )
        rows.append(_row(panels))
    return torch.from_numpy(np.stack(rows)).float() / 255


def colours(before: torch.Tensor, after: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (N, D) x 2 -> colours (G, G, 3) x 2 in [0, 1]: equal features have equal colours in both.

    Directions of features count, not their lengths, of which a few are far larger than all others.
    """
    features = F.normalize(torch.cat((before, after)).float().cpu(), dim=1)  # (2N, D)
    centred = features - features.mean(0)
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:3]
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    values = (
        centred @ (axes * largest.sign()).T
    )  # (2N, 3), with signs that do not depend on the machine
    low, high = values.quantile(0.02, dim=0), values.quantile(0.98, dim=0)
    values = ((values - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    if values.shape[1] < 3:
        values = F.pad(values, (0, 3 - values.shape[1]))
    side = math.isqrt(len(before))
    return tuple(half.reshape(side, side, 3) for half in values.chunk(2))


def _enlarged(cells: torch.Tensor) -> Image.Image:
    """(G, G, 3) in [0, 1] -> a panel of plain squares."""
    picture = Image.fromarray(cells.mul(255).round().to(torch.uint8).numpy())
    return picture.resize((SIDE, SIDE), Image.Resampling.NEAREST)


def _grid(picture: torch.Tensor, cells: torch.Tensor) -> Image.Image:
    """(3, S, S) uint8 -> a panel with grid lines and the hidden cells tinted."""
    panel = Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()).convert("RGB")
    draw, step = ImageDraw.Draw(panel, "RGBA"), SIDE // len(cells)
    for y, x in cells.nonzero().tolist():
        draw.rectangle(
            (x * step, y * step, (x + 1) * step - 1, (y + 1) * step - 1), fill=(*_HIDDEN, 90)
        )
    for place in range(step, SIDE, step):
        draw.line((place, 0, place, SIDE), fill=(*_LINE, 60))
        draw.line((0, place, SIDE, place), fill=(*_LINE, 60))
    return panel


def _outlined(panel: Image.Image, cells: torch.Tensor) -> Image.Image:
    """Draw the border of the hole."""
    draw, step, hidden = (
        ImageDraw.Draw(panel),
        SIDE // len(cells),
        F.pad(cells, (1, 1, 1, 1)).tolist(),
    )
    for y in range(len(cells)):
        for x in range(len(cells)):
            if hidden[y + 1][x + 1]:
                left, top, right, bottom = (
                    x * step,
                    y * step,
                    (x + 1) * step - 1,
                    (y + 1) * step - 1,
                )
                for other, line in (
                    (hidden[y][x + 1], (left, top, right, top)),
                    (hidden[y + 2][x + 1], (left, bottom, right, bottom)),
                    (hidden[y + 1][x], (left, top, left, bottom)),
                    (hidden[y + 1][x + 2], (right, top, right, bottom)),
                ):
                    if not other:
                        draw.line(line, fill=_LINE)
    return panel


def _row(panels) -> np.ndarray:
    picture = Image.new("RGB", (len(panels) * (SIDE + GAP) + GAP, SIDE + TITLE + GAP), _PAPER)
    draw = ImageDraw.Draw(picture)
    for number, (title, panel) in enumerate(panels):
        x = GAP + number * (SIDE + GAP)
        while draw.textlength(title) > SIDE:
            title = title[:-4] + "..."
        draw.text((x, 3), title, fill=_INK)
        picture.paste(panel, (x, TITLE))
    return np.asarray(picture)
