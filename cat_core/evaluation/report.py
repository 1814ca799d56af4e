"""What was measured, as text, as rows and as one HTML file with pictures and curves in it."""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from .measure import METRICS, RANKING, Estimate, Line, Measured, name

SHOWN = 4  # samples a section
SIDE = 448  # pixels of a picture in the file, at most; twice what is shown
COLUMNS = (
    "metric",
    "name",
    "images",
    "value",
    "low",
    "high",
    "difference",
    "difference_low",
    "difference_high",
)
_COLOURS = (
    "#8c8c8c",
    "#2a5ab4",
    "#c83c28",
    "#2e8b57",
    "#a05fb4",
    "#c88a1e",
)  # the first ones as in training/plots.py
_PLOT = (560, 220, 48, 24)  # width, height, left and bottom margin


def rows(lines: Sequence[Line]) -> list[tuple]:
    """The lines' numbers in the order of COLUMNS, None where there is none."""
    return [
        (line.metric, line.name, line.images, *_numbers(line.estimate), *_numbers(line.difference))
        for line in lines
    ]


def table(lines: Sequence[Line]) -> str:
    """The lines as text in columns, intervals in brackets."""
    cells = [("", "", "value", "difference to the first", "")]
    cells += [
        (
            _title(line) if first else "",
            line.name,
            _text(line.estimate),
            _text(line.difference, "+"),
            verdict(line),
        )
        for line, first in _first_of_each(lines)
    ]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def verdict(line: Line) -> str:
    """better or worse than the first folder, where the interval of the difference leaves no doubt; else nothing."""
    gap = line.difference
    if (
        gap is None
        or gap.low is None
        or gap.low <= 0 <= gap.high
        or METRICS[line.metric].better == "neither"
    ):
        return ""
    return "better" if (gap.value > 0) == (METRICS[line.metric].better == "higher") else "worse"


# HTML ---------------------------------------------------------------------------------------------------------------


def page(
    measured: Measured,
    lines: Sequence[Line],
    notes: Sequence[str],
    facts: Mapping[str, object],
    histogram: Mapping[str, Sequence[float]] | None,
    seed: int,
) -> str:
    """The whole report, nothing outside of it needed.

    Args:
        facts: what was compared, for the top of the page.
        histogram: edges and counts, see `curves`, of the feature cosines.
        seed: of the choice of random pictures.
    """
    parts = [
        f"<dl>{''.join(f'<dt>{_safe(key)}</dt><dd>{_safe(value)}</dd>' for key, value in facts.items())}</dl>",
        _html_table(lines),
        *(f"<p class=note>{_safe(note)}</p>" for note in notes),
    ]
    if histogram:
        parts.append(
            _figure("Cosine of the patches in the hole to the true picture's", curves(**histogram))
        )
    metric = next((metric for metric in RANKING if metric in measured.folders[0].values), None)
    values = {
        title: folder.values[metric] for title, folder in zip(_names(measured), measured.folders)
    }
    edges = np.histogram_bin_edges(np.concatenate([*values.values()]), 30)
    parts.append(
        _figure(
            f"{METRICS[metric].title}, by picture",
            curves(
                edges, {key: np.histogram(numbers, edges)[0] for key, numbers in values.items()}
            ),
        )
    )
    parts += [
        _section(measured, title, chosen, metric)
        for title, chosen in _choices(values, metric, seed)
    ]
    return _PAGE.format(body="\n".join(parts))


def curves(edges: Sequence[float], counts: Mapping[str, Sequence[int]]) -> str:
    """Histograms over common bins as inline SVG: each a line of the share of its values in each bin."""
    used = np.flatnonzero(np.sum([np.asarray(c) for c in counts.values()], axis=0))
    first, last = (used[0], used[-1] + 1) if len(used) else (0, len(edges) - 1)
    edges = np.asarray(edges, float)[first : last + 1]
    shares = {
        key: np.asarray(c, float)[first:last] / max(np.sum(c), 1) for key, c in counts.items()
    }
    top = max(share.max() for share in shares.values()) or 1.0
    width, height, left, bottom = _PLOT

    def x(value):
        return np.interp(value, (edges[0], edges[-1]), (left, width - 20))

    def y(share):
        return height - bottom - share / top * (height - bottom - 10)

    marks = [
        f'<line x1="{left}" x2="{width - 20}" y1="{y(v):.1f}" y2="{y(v):.1f}" class=grid />'
        f'<text x="{left - 6}" y="{y(v) + 4:.1f}" class=end>{100 * v:.3g} %</text>'
        for v in _ticks(0, top)
    ]
    marks += [
        f'<text x="{x(v):.1f}" y="{height - 6}" class=middle>{v:.6g}</text>'
        for v in _ticks(edges[0], edges[-1])
    ]
    for colour, share in zip(_colours(len(shares)), shares.values()):
        steps = " ".join(
            f"{x(a):.1f},{y(s):.1f} {x(b):.1f},{y(s):.1f}"
            for a, b, s in zip(edges, edges[1:], share)
        )
        marks.append(
            f'<polyline points="{steps}" fill="none" stroke="{colour}" stroke-width="2" />'
        )
    legend = "".join(
        f'<span><i style="background:{colour}"></i>{_safe(key)}</span>'
        for colour, key in zip(_colours(len(shares)), shares)
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img">{"".join(marks)}</svg>'
        f"<div class=legend>{legend}</div>"
    )


def _ticks(low: float, high: float) -> np.ndarray:
    """About five round numbers from low to high."""
    rough = (high - low) / 5
    step = next(
        m for m in 10.0 ** math.floor(math.log10(rough)) * np.array((1, 2, 5, 10)) if m >= rough
    )
    return step * np.arange(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)


def _choices(
    values: Mapping[str, Sequence[float]], metric: str, seed: int
) -> list[tuple[str, np.ndarray]]:
    """Titles of the sections and the places of the records in them."""
    numbers = [np.array(column) for column in values.values()]
    sign = -1 if METRICS[metric].better == "higher" else 1
    title, first, count = METRICS[metric].title, next(iter(values)), len(numbers[0])

    def least(column):
        return np.argsort(column, kind="stable")[:SHOWN]

    sections = [
        (f"Best of {first} by {title}", least(sign * numbers[0])),
        (f"Worst of {first} by {title}", least(-sign * numbers[0])),
        (
            "Random",
            np.sort(np.random.default_rng(seed).choice(count, min(SHOWN, count), replace=False)),
        ),
    ]
    if len(numbers) == 2:
        second, gap = list(values)[1], sign * (numbers[1] - numbers[0])
        sections += [
            (f"{second} ahead of {first} by most, {title}", least(gap)),
            (f"{second} behind {first} by most, {title}", least(-gap)),
        ]
    return sections


def _section(measured: Measured, heading: str, chosen: np.ndarray, metric: str) -> str:
    blocks = []
    for place in map(int, chosen):
        sample = measured.samples.sample(measured.samples.records[place])
        grey = Image.composite(
            Image.new("RGB", sample.picture.size, (127, 127, 127)), sample.picture, sample.hole
        )
        pictures = [("original", sample.picture), ("hole", grey)]
        for title, folder in zip(_names(measured), measured.folders):
            made = folder.results.picture(sample.record.id, measured.samples.size)
            pictures.append((f"{title}: {folder.values[metric][place]:.4g}", made))
        shown = "".join(
            f'<figure><img src="{_data(picture)}" alt="{_safe(caption)}">'
            f"<figcaption>{_safe(caption)}</figcaption></figure>"
            for caption, picture in pictures
        )
        blocks.append(
            f"<div class=sample><h3>{_safe(sample.record.label)} <small>{_safe(sample.record.id)}</small></h3>"
            f"<div class=row style='--columns: {len(pictures)}'>{shown}</div></div>"
        )
    return f"<h2>{_safe(heading)}</h2>{''.join(blocks)}"


def _html_table(lines: Sequence[Line]) -> str:
    body = []
    for line, first in _first_of_each(lines):
        found, better, heading = verdict(line), METRICS[line.metric].better, ""
        if first:
            hint = "" if better == "neither" else f" <small>{better} is better</small>"
            count = sum(other.metric == line.metric for other in lines)
            heading = f"<th rowspan={count}>{_safe(_title(line))}{hint}</th>"
        body.append(
            f"<tr{' class=first' if first else ''}>{heading}<td>{_safe(line.name)}</td>"
            f"<td class=number>{_text(line.estimate)}</td><td class=number>{_text(line.difference, '+')}</td>"
            f"<td class={found or 'open'}>{found}</td></tr>"
        )
    return (
        "<table><thead><tr><th>metric</th><th>folder</th><th class=number>value [95 %]</th>"
        f"<th class=number>difference to the first [95 %]</th><th></th></tr></thead><tbody>{''.join(body)}</tbody></table>"
    )


def _figure(title: str, picture: str) -> str:
    return f"<h2>{_safe(title)}</h2>{picture}"


def _data(picture: Image.Image) -> str:
    """A data URI; small enough that a report of a hundred pictures opens at once."""
    picture, file = picture.copy(), io.BytesIO()
    picture.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
    picture.save(file, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


# Words --------------------------------------------------------------------------------------------------------------


def _names(measured: Measured) -> list[str]:
    folders = [folder.results for folder in measured.folders]
    return [name(results, folders) for results in folders]


def _first_of_each(lines: Sequence[Line]) -> list[tuple[Line, bool]]:
    return [(line, i == 0 or lines[i - 1].metric != line.metric) for i, line in enumerate(lines)]


def _title(line: Line) -> str:
    metric = METRICS[line.metric]
    return f"{metric.title}, {metric.unit}" if metric.unit else metric.title


def _numbers(estimate: Estimate | None) -> tuple:
    return (estimate.value, estimate.low, estimate.high) if estimate else (None, None, None)


def _text(estimate: Estimate | None, sign: str = "") -> str:
    if estimate is None:
        return ""
    value, low, high = (x if x is None else f"{x:{sign}.4g}" for x in _numbers(estimate))
    return value if low is None else f"{value} [{low}, {high}]"


def _colours(count: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(count)]


def _safe(value: object) -> str:
    return html.escape(str(value))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Evaluation</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 32px auto; padding: 0 24px; color: #1c1c1c;
       background: #fff }}
h1 {{ font-size: 26px; margin: 0 0 16px }}
h2 {{ font-size: 18px; margin: 40px 0 12px }}
h3 {{ font-size: 15px; margin: 0 0 6px }}
small {{ color: #6b6b6b; font-weight: normal }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: 2px 20px; margin: 0 0 28px }}
dt {{ color: #6b6b6b }}
dd {{ margin: 0; overflow-wrap: anywhere }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ text-align: left; padding: 5px 16px 5px 0; vertical-align: top; font-weight: normal }}
thead th {{ color: #6b6b6b; border-bottom: 1px solid #1c1c1c }}
tbody th small {{ display: block; font-size: 12px }}
tr.first th, tr.first td {{ border-top: 1px solid #e2e2e2 }}
.number {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }}
.better {{ color: #1d7a46 }} .worse {{ color: #c03020 }}
.note {{ color: #6b6b6b; margin: 10px 0 0 }}
svg text {{ font: 12px system-ui, sans-serif; fill: #6b6b6b }}
svg .grid {{ stroke: #e2e2e2 }} svg .end {{ text-anchor: end }} svg .middle {{ text-anchor: middle }}
svg {{ max-width: 100%; height: auto; display: block }}
.legend span {{ margin-right: 20px }}
.legend i {{ display: inline-block; width: 16px; height: 3px; vertical-align: middle; margin-right: 6px }}
.sample {{ margin: 0 0 20px }}
.row {{ display: grid; grid-template-columns: repeat(var(--columns), minmax(96px, 224px)); gap: 12px }}
figure {{ margin: 0 }}
img {{ width: 100%; aspect-ratio: 1; display: block; background: #eee }}
figcaption {{ font-size: 13px; color: #6b6b6b; overflow-wrap: anywhere }}
</style></head><body>
<h1>Evaluation</h1>
{body}
</body></html>
"""
