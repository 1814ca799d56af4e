"""What the ablation's pictures say: table, histogram, seeds side by side, reports.

And what RefAdapter makes of its visual prompt.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cat_diffusion.cat_core import weights
from cat_diffusion.cat_core.evaluation import estimates, metrics, report
from cat_diffusion.cat_core.evaluation import measure as measuring
from cat_diffusion.cat_core.evaluation.estimates import Line
from cat_diffusion.cat_core.evaluation.measure import Measured, MeasuredFolder
from cat_diffusion.cat_core.evaluation.results import Results, SampleSet
from cat_diffusion.cat_core.pictures import plots
from cat_diffusion.cat_core.training import start
from cat_diffusion.cat_core.training.assemble import assemble
from cat_diffusion.cat_core.training.batches import Batches
from cat_diffusion.cat_core.training.stages import STAGES
from cat_diffusion.nodes.host import model_files
from cat_diffusion.nodes.host.build import build_clip
from cat_diffusion.nodes.host.clip import plain_tokens
from cat_diffusion.nodes.host.denoiser import Denoiser, trainable_unet
from demo_model import classifier, networks, score
from demo_model.ablation_rows import (
    BATCH,
    DEMO_MODEL,
    HOLES,
    ROWS,
    SEEDS,
    WITH_SEM_INPAINTER,
    checkpoint,
    results_folder,
    test_manifest,
    test_set,
)
from evaluation import comparison
from evaluation.feature_networks import HostClip
from evaluation.picture_bar import picture_bar
from training import stage_parts

RESAMPLES = 1000
FID_RESAMPLES = 100
SHOWN = 8  # samples on the sheet of seeds
PROBED = 16  # batches of the probe


@dataclass(frozen=True)
class TableMetric:
    """How a metric is written."""

    title: str
    digits: int
    scale: int = 1

    def text(self, value: float, sign: str = "") -> str:
        return f"{self.scale * value:{sign}.{self.digits}f}"


METRICS = {
    "fid": TableMetric("FID (demo CLIP)", 3),
    "local_fid": TableMetric("Local FID (demo CLIP)", 3),
    "clip_score": TableMetric("CLIP score (demo CLIP)", 1),
    "object_similarity": TableMetric("Similarity to the original object", 3),
    "named": TableMetric("Colour and shape named right, %", 1, scale=100),
    "colour": TableMetric("Colour, %", 1, scale=100),
    "shape": TableMetric("Shape, %", 1, scale=100),
    "background_mean": TableMetric("Background error, levels", 2),
}
DIVERSITY = TableMetric("Diversity across seeds in the hole, levels", 1)


class DemoClip(HostClip):
    """The demo model's CLIP: features (B, D), and with .image and .text a network of CLIP score."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.text_encoder = build_clip(model_files.read_path(path))

    def image(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """The projected features (B, D) of pictures."""
        pixels = self.pixels(pictures).movedim(1, -1).float() / 255
        return self.vision.encode_image(pixels, crop=False)["image_embeds"].float()

    def text(self, texts: Sequence[str]) -> torch.Tensor:
        """The projected features (B, D) of texts."""
        features = []
        for text in texts:
            tokens = plain_tokens(self.text_encoder, text)
            _, pooled = self.text_encoder.encode_from_tokens(tokens, return_pooled=True)
            features.append(pooled)
        return torch.cat(features).float()


def measure(work: Path, shorter: int) -> None:
    """The table, SemInpainter's histogram, the seeds side by side and a report of pictures."""
    manifest = test_manifest(work, shorter)
    clip = DemoClip(DEMO_MODEL)
    tables = []
    found = {}
    for hole in HOLES:
        found[hole], table = _measure_holes(test_set(manifest, hole), clip, work)
        tables.append(table)
    found["prompts"] = probe(manifest, work, shorter)
    errors = ", ".join(f"{name} {error:.5f}" for name, error in found["prompts"].items())
    tables.append(
        "Mean squared error of the noise that row 3 predicts for test scenes, by its visual "
        f"prompt: {errors}.\n"
    )
    comparison.write(work / "measured.json", json.dumps(found, indent=1) + "\n")
    comparison.write(work / "table.md", "\n".join(tables))
    print("\n".join(tables))


def _measure_holes(all_samples: SampleSet, clip: DemoClip, work: Path) -> tuple[dict, str]:
    """What all rows made of one kind of hole: the numbers, and the table; pictures are written."""
    hole = all_samples.hole
    folders = []
    for row in ROWS:
        for seed in SEEDS:
            folders.append(Results.open(results_folder(work, row, hole, seed)))
    samples, notes = all_samples.of_all(folders, False)
    with torch.inference_mode():
        with picture_bar(len(samples.records)) as bar:
            measured = measuring.measure(samples, folders, clip, clip, bar.update)
        cosines = comparison.feature_cosines(
            checkpoint(WITH_SEM_INPAINTER, work), samples, RESAMPLES, 0
        )
    for folder in measured.folders:
        folder.values.update(judged(samples, folder.results))
    cells = compare(measured)
    cells["diversity_pixels"] = []
    for values in measured.diversity.values():
        cells["diversity_pixels"].append(spread(values["diversity_pixels"]))

    first_seeds = Measured(samples, measured.folders[:: len(SEEDS)], measured.real)
    lines, more_notes = estimates.summary(first_seeds, RESAMPLES, None, 0)
    facts = {
        "pictures": len(samples.records),
        "holes": hole,
        "networks": "the demo model's CLIP",
    }
    page = report.page(
        first_seeds, lines + cosines.lines, notes + more_notes, facts, cosines.histogram, 0
    )
    comparison.write(work / "report" / hole / "index.html", page)
    fig_4a(cosines.histogram).save(work / f"histogram-{hole}.png")
    seeds_sheet(samples, folders).save(work / f"seeds-{hole}.png")
    numbers = {
        "rows": cells,
        "feature_cosines": {line.name: line.estimate.value for line in cosines.lines},
        "histogram": cosines.histogram,
    }
    return numbers, markdown(hole, len(samples.records), cells, cosines.lines)


def fig_4a(histogram: Mapping[str, Sequence]) -> Image.Image:
    """The streamed counts as the picture that the graph's histogram is, bin for bin."""
    edges = np.array(histogram["edges"])
    middles = (edges[1:] + edges[:-1]) / 2
    values = {}
    for kind, counts in histogram["counts"].items():
        values[kind] = np.repeat(middles, counts).tolist()
    low = np.floor(10 * min(map(min, values.values()))) / 10  # where the plot begins
    return plots.histogram(values, round((1 - low) / (edges[1] - edges[0])))


def judged(samples: SampleSet, results: Results) -> dict[str, list[float]]:
    """Whether the independent classifier names what was asked for, by picture."""
    pictures = []
    for record in samples.records:
        pictures.append(np.asarray(results.picture(record.id, samples.size)))
    boxes = np.array([record.box for record in samples.records])
    verdict = classifier.judge(score.the_judge(), np.stack(pictures), boxes)
    right = {"colour": [], "shape": [], "named": []}
    for place, record in enumerate(samples.records):
        colour, shape = record.label.split()
        seen_shape, seen_colour = verdict.names(place)
        right["colour"].append(float(seen_colour == colour))
        right["shape"].append(float(seen_shape == shape))
        right["named"].append(float((seen_colour, seen_shape) == (colour, shape)))
    return right


def probe(manifest: Path, work: Path, shorter: int) -> dict[str, float]:
    """Row 3's loss on test scenes with one visual prompt or another: does it look at it?

    Noise and holes are the same each time, and the U-Net's text stays the object's name throughout.
    """
    file = weights.read(checkpoint(WITH_SEM_INPAINTER, work))
    encoders, store = stage_parts.encoded_samples(
        file, "diffusion", manifest, split="test", size=networks.SIZE
    )
    modules = start.trainable_parts(file.architecture, file.parts, 0)
    modules["unet"] = trainable_unet(file)
    true = assemble(STAGES["ref-adapter"], modules, Denoiser).eval()
    predicted = assemble(STAGES["cascade"], modules, Denoiser).eval()
    observed = assemble(STAGES["ref-adapter-observed"], modules, Denoiser).eval()
    errors: dict[str, list[torch.Tensor]] = {}
    with torch.inference_mode():
        source = Batches(store, BATCH, 0, encoders.context([""]))
        for step in range(max(PROBED // shorter, 1)):
            batch = _kept(source(step, range(BATCH)))
            dropped = torch.ones_like(batch["dropped"])
            another_scene = batch["teacher_patches"].roll(1, 0)
            for name, objective, changes in (
                ("true features", true, {}),
                ("predicted", predicted, {}),
                ("observed", observed, {}),
                ("another scene's", true, {"teacher_patches": another_scene}),
                ("none", true, {"dropped": dropped}),
            ):
                terms, _ = objective(batch | changes)
                errors.setdefault(name, []).append(terms["noise"])
    return {name: float(torch.cat(values).mean()) for name, values in errors.items()}


def _kept(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The rows of a batch that keep their visual prompt."""
    keep = ~batch["dropped"]
    return {key: value[keep] for key, value in batch.items()}


def compare(measured: Measured) -> dict[str, list[dict[str, float]]]:
    """By metric and row: the mean over seeds, its extremes, and the difference to the row before.

    That has a 95 % interval, which comes from pictures drawn again, the same ones for both rows;
    training runs are not drawn again.
    """
    count = len(measured.samples.records)
    everything = {}
    for metric in METRICS:
        resamples = FID_RESAMPLES if "fid" in metric else RESAMPLES
        cells = []
        drawn_before = None
        for row in range(len(ROWS)):
            folders = measured.folders[row * len(SEEDS) : (row + 1) * len(SEEDS)]
            statistic = _MeanOverSeeds(metric, folders, measured)
            cell = spread(statistic.each(np.arange(count)))
            drawn = metrics.resampled(statistic, count, resamples, 0)
            if drawn_before is not None:
                gap = cell["mean"] - cells[-1]["mean"]
                low, high = metrics.interval(gap, drawn - drawn_before)
                cell |= {"difference": gap, "low": float(low), "high": float(high)}
            cells.append(cell)
            drawn_before = drawn
        everything[metric] = cells
    return everything


class _MeanOverSeeds:
    """A metric of one row: rows of the test set -> its mean over the folders of all seeds."""

    def __init__(self, metric: str, folders: Sequence[MeasuredFolder], measured: Measured):
        self.statistics = []
        for folder in folders:
            self.statistics.append(estimates.statistic_of(metric, folder, measured.real))

    def each(self, rows: np.ndarray) -> list[float]:
        """By seed."""
        return [float(statistic(rows)) for statistic in self.statistics]

    def __call__(self, rows: np.ndarray) -> float:
        return np.mean([statistic(rows) for statistic in self.statistics])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and extremes."""
    return {
        "mean": float(sum(values) / len(values)),
        "least": float(min(values)),
        "most": float(max(values)),
    }


def markdown(
    hole: str, count: int, cells: Mapping[str, Sequence[Mapping]], cosines: Sequence[Line]
) -> str:
    """The table as the documentation shows it."""
    holes = "boxes" if hole == "box" else "exact outlines"
    titles = " | ".join(f"{row.number}. {row.name}" for row in ROWS)
    lines = [
        f"| {count} holes, {holes} | {titles} | 2 - 1 [95 %] | 3 - 2 [95 %] |",
        "|---|---|---|---|---|---|",
    ]
    for name, of_rows in cells.items():
        metric = METRICS.get(name, DIVERSITY)
        texts = [metric.text(cell["mean"]) for cell in of_rows]
        texts += [_difference(metric, cell) for cell in of_rows[1:]]
        lines.append(f"| {metric.title} | " + " | ".join(texts) + " |")
    means = []
    for line in cosines:
        kind, _, _ = line.name.partition(",")
        means.append(f"{kind} {line.estimate.value:.3f}")
    lines.append("")
    lines.append(
        f"Cosine of the features in the hole to the true ones, row 3: {', '.join(means)}.\n"
    )
    return "\n".join(lines)


def _difference(metric: TableMetric, cell: Mapping[str, float]) -> str:
    """The difference to the row before and its interval; empty where none was estimated."""
    if "difference" not in cell:
        return ""
    low = metric.text(cell["low"], "+")
    high = metric.text(cell["high"], "+")
    return f"{metric.text(cell['difference'], '+')} [{low}, {high}]"


def seeds_sheet(samples: SampleSet, folders: Sequence[Results]) -> Image.Image:
    """A few samples of every row with every seed, the paper's Fig. 4b."""
    shown = []
    for record in samples.records[:SHOWN]:
        sample = samples.sample(record)
        white = Image.new("RGB", sample.picture.size, "white")
        hidden = Image.composite(white, sample.picture, sample.hole)
        pictures = [sample.picture, hidden]
        for folder in folders:
            pictures.append(folder.picture(record.id, samples.size))
        shown.append((record.label, pictures))
    titles = ["original", "hole"]
    for row in ROWS:
        titles += [f"row {row.number}, seed {seed}" for seed in SEEDS]
    return plots.sheet(shown, titles, samples.size)
