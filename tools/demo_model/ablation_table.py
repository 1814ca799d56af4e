"""What the ablation's pictures say: table, histogram, seeds side by side, reports, and what RefAdapter makes of its prompt."""

import json
from pathlib import Path

from demo_model import score
from demo_model.ablation import (
    BATCH,
    DEMO_MODEL,
    HOLES,
    ROWS,
    SEEDS,
    checkpoint,
    results_folder,
    test_manifest,
    test_set,
)
from evaluation import comparison
from training import stage_run

RESAMPLES, FID_RESAMPLES = 1000, 100
METRICS = {
    "fid": ("FID (demo CLIP)", 1, 3),
    "local_fid": ("Local FID (demo CLIP)", 1, 3),
    "clip_score": ("CLIP score (demo CLIP)", 1, 1),
    "object_similarity": ("Similarity to the original object", 1, 3),
    "named": ("Colour and shape named right, %", 100, 1),
    "colour": ("Colour, %", 100, 1),
    "shape": ("Shape, %", 100, 1),
    "background_mean": ("Background error, levels", 1, 2),
}
SHOWN, PROBED = 8, 16  # samples on the sheet of seeds, batches of the probe


def measure(arguments) -> None:
    """The table, SemInpainter's histogram, the seeds side by side and a report of pictures."""
    import torch

    from cat_diffusion.cat_core.evaluation import measure as measuring
    from cat_diffusion.cat_core.evaluation import report
    from cat_diffusion.cat_core.evaluation.results import Results

    work, manifest = arguments.work, test_manifest(arguments)
    tables, found, clip = [], {}, demo_clip(DEMO_MODEL)
    for hole in HOLES:
        samples = test_set(manifest, hole)
        folders = [
            Results.open(results_folder(work, number, hole, seed))
            for number in (1, 2, 3)
            for seed in SEEDS
        ]
        samples, notes = samples.of_all(folders, False)
        with torch.inference_mode():
            measured = measuring.measure(samples, folders, clip, clip, comparison.progress())
            cosines = comparison.feature_cosines(checkpoint(3, work), samples, RESAMPLES, 0)
        for folder in measured.folders:
            folder.values.update(judged(samples, folder.results))
        rows = compare(measured)
        rows |= {
            "diversity_pixels": [
                spread(values["diversity_pixels"]) for values in measured.diversity.values()
            ]
        }
        found[hole] = {
            "rows": rows,
            "feature_cosines": {line.name: line.estimate.value for line in cosines["lines"]},
            "histogram": cosines["histogram"],
        }
        tables.append(markdown(hole, len(samples.records), rows, cosines["lines"]))
        first = measuring.Measured(samples, measured.folders[:: len(SEEDS)], measured.real)
        lines, more = measuring.summary(first, RESAMPLES, None, 0)
        facts = {
            "pictures": len(samples.records),
            "holes": hole,
            "networks": "the demo model's CLIP",
        }
        comparison.write(
            work / "report" / hole / "index.html",
            report.page(
                first, lines + cosines["lines"], notes + more, facts, cosines["histogram"], 0
            ),
        )
        fig_4a(cosines["histogram"]).save(work / f"histogram-{hole}.png")
        seeds_sheet(samples, folders).save(work / f"seeds-{hole}.png")
    found["prompts"] = probe(arguments)
    tables.append(
        "Mean squared error of the noise that row 3 predicts for test scenes, by its visual prompt: "
        + ", ".join(f"{name} {error:.5f}" for name, error in found["prompts"].items())
        + ".\n"
    )
    comparison.write(work / "measured.json", json.dumps(found, indent=1) + "\n")
    comparison.write(work / "table.md", "\n".join(tables))
    print("\n".join(tables))


def fig_4a(histogram):
    """The streamed counts as the picture that the graph's histogram is, bin for bin."""
    import numpy as np

    from cat_diffusion.cat_core.pictures import plots

    edges = np.array(histogram["edges"])
    values = {
        kind: np.repeat((edges[1:] + edges[:-1]) / 2, counts)
        for kind, counts in histogram["counts"].items()
    }
    low = np.floor(10 * min(v.min() for v in values.values())) / 10  # where the plot begins
    return plots.histogram(
        {kind: v.tolist() for kind, v in values.items()}, round((1 - low) / (edges[1] - edges[0]))
    )


def demo_clip(path: Path):
    """The demo model's CLIP as extractor of features (B, D) and, with .image and .text, as network of the CLIP score."""
    from cat_diffusion.nodes.host import model_files
    from cat_diffusion.nodes.host.build import build_clip
    from cat_diffusion.nodes.host.clip import plain_tokens

    clip = build_clip(model_files.read_path(path))

    class DemoClip(comparison.HostClip):
        def image(self, pictures):
            pixels = self.pixels(pictures).movedim(1, -1).float() / 255
            return self.vision.encode_image(pixels, crop=False)["image_embeds"].float()

        def text(self, texts):
            import torch

            return torch.cat(
                [
                    clip.encode_from_tokens(plain_tokens(clip, text), return_pooled=True)[1]
                    for text in texts
                ]
            ).float()

    return DemoClip(path)


def judged(samples, results) -> dict[str, list[float]]:
    """Whether the independent classifier names what was asked for, by picture."""
    import numpy as np

    from demo_model import classifier, scenes

    pictures = np.stack(
        [np.asarray(results.picture(record.id, samples.size)) for record in samples.records]
    )
    verdict = classifier.judge(
        score.the_judge(), pictures, np.array([record.box for record in samples.records])
    )
    right = {"colour": [], "shape": []}
    for record, colour, shape in zip(samples.records, verdict.colour, verdict.shape):
        wanted_colour, wanted_shape = record.label.split()
        right["colour"].append(float(scenes.COLOUR_NAMES[colour] == wanted_colour))
        right["shape"].append(float(scenes.SHAPES[shape] == wanted_shape))
    return right | {"named": [min(pair) for pair in zip(*right.values())]}


def probe(arguments) -> dict[str, float]:
    """Row 3's loss on test scenes, same noise and holes each time, with one visual prompt or another: does it look at it?

    The U-Net's text stays the object's name throughout.
    """
    import torch

    from cat_diffusion.cat_core import weights
    from cat_diffusion.cat_core.training import samples, start
    from cat_diffusion.cat_core.training.objectives import Diffusion, stable_diffusion_schedule
    from cat_diffusion.nodes.host.denoiser import Denoiser, trainable_unet
    from demo_model import networks

    file = weights.read(checkpoint(3, arguments.work))
    encoders, store = stage_run.encoded_samples(
        file, "diffusion", test_manifest(arguments), "test", networks.SIZE, None
    )
    modules = start.trainable_parts(file.architecture, file.parts, 0)
    denoiser = Denoiser(trainable_unet(file), modules["ref_adapter"]).eval().requires_grad_(False)
    true = Diffusion(denoiser, stable_diffusion_schedule())
    predicted = Diffusion(denoiser, stable_diffusion_schedule(), modules["sem_inpainter"].eval())
    observed = Diffusion(denoiser, stable_diffusion_schedule(), observed=True)
    errors = {}
    with torch.inference_mode():
        source = samples.Source(store, BATCH, 0, encoders.context([""]))
        for step in range(max(PROBED // arguments.shorter, 1)):
            batch = source(step, range(BATCH))
            keep = ~batch["dropped"]
            batch = {key: value[keep] for key, value in batch.items()}
            none = batch | {"dropped": torch.ones_like(batch["dropped"])}
            another = batch | {"teacher_patches": batch["teacher_patches"].roll(1, 0)}
            for name, objective, some in (
                ("true features", true, batch),
                ("predicted", predicted, batch),
                ("observed", observed, batch),
                ("another scene's", true, another),
                ("none", true, none),
            ):
                errors.setdefault(name, []).append(objective(some)[0]["noise"])
    return {name: float(torch.cat(values).mean()) for name, values in errors.items()}


def compare(measured) -> dict[str, list[dict]]:
    """By metric and row: the mean over seeds, its extremes, and the difference to the row before with its 95 % interval.

    The interval comes from pictures drawn again, the same ones for both rows; training runs are not drawn again.
    """
    import numpy as np

    from cat_diffusion.cat_core.evaluation import measure as measuring
    from cat_diffusion.cat_core.evaluation import metrics

    count, everything = len(measured.samples.records), {}
    for metric in METRICS:
        before = None
        for number in range(3):
            some = measured.folders[number * len(SEEDS) : (number + 1) * len(SEEDS)]
            statistics = [measuring.statistic_of(metric, folder, measured.real) for folder in some]
            values = [float(statistic(np.arange(count))) for statistic in statistics]
            drawn = metrics.resampled(
                lambda rows: np.mean([statistic(rows) for statistic in statistics]),
                count,
                FID_RESAMPLES if "fid" in metric else RESAMPLES,
                0,
            )
            row = spread(values)
            if before:
                gap = row["mean"] - before[0]
                low, high = metrics.interval(gap, drawn - before[1])
                row |= {"difference": gap, "low": float(low), "high": float(high)}
            everything.setdefault(metric, []).append(row)
            before = (row["mean"], drawn)
    return everything


def spread(values) -> dict:
    return {
        "mean": float(sum(values) / len(values)),
        "least": float(min(values)),
        "most": float(max(values)),
    }


def markdown(hole: str, count: int, rows, cosines) -> str:
    """The table as README shows it."""
    lines = [
        f"| {count} holes, {'boxes' if hole == 'box' else 'exact outlines'} | "
        + " | ".join(f"{number}. {row.name}" for number, row in enumerate(ROWS, 1))
        + " | 2 - 1 [95 %] | 3 - 2 [95 %] |",
        "|---|---|---|---|---|---|",
    ]
    for metric, cells in rows.items():
        title, scale, digits = METRICS.get(
            metric, ("Diversity across seeds in the hole, levels", 1, 1)
        )
        texts = [f"{scale * cell['mean']:.{digits}f}" for cell in cells]
        texts += [
            f"{scale * cell['difference']:+.{digits}f} [{scale * cell['low']:+.{digits}f}, {scale * cell['high']:+.{digits}f}]"
            if "difference" in cell
            else ""
            for cell in cells[1:]
        ]
        lines.append(f"| {title} | " + " | ".join(texts) + " |")
    means = ", ".join(f"{line.name.split(',')[0]} {line.estimate.value:.3f}" for line in cosines)
    return (
        "\n".join(lines)
        + f"\n\nCosine of the features in the hole to the true ones, row 3: {means}.\n"
    )


def seeds_sheet(samples, folders):
    """A few samples of every row with every seed, the paper's Fig. 4b."""
    from PIL import Image

    from cat_diffusion.cat_core.pictures import plots

    shown = []
    for record in samples.records[:SHOWN]:
        sample_ = samples.sample(record)
        hidden = Image.composite(
            Image.new("RGB", sample_.picture.size, "white"), sample_.picture, sample_.hole
        )
        shown.append(
            (
                record.label,
                [
                    sample_.picture,
                    hidden,
                    *(folder.picture(record.id, samples.size) for folder in folders),
                ],
            )
        )
    titles = [
        "original",
        "hole",
        *(f"row {number}, seed {seed}" for number in (1, 2, 3) for seed in SEEDS),
    ]
    return plots.sheet(shown, titles, samples.size)
