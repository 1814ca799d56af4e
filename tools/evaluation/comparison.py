"""Measure folders of finished pictures and report what they are worth; tools/evaluate.py's work."""

import csv
import dataclasses
import io
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cat_diffusion.cat_core import files, preprocess
from cat_diffusion.cat_core.data import chosen
from cat_diffusion.cat_core.data.masks import HOLES
from cat_diffusion.cat_core.errors import CatError
from cat_diffusion.cat_core.evaluation import breakdown, estimates, metrics, report, tables
from cat_diffusion.cat_core.evaluation.estimates import Line
from cat_diffusion.cat_core.evaluation.measure import Measured, measure
from cat_diffusion.cat_core.evaluation.metrics import EvaluationError, Missing
from cat_diffusion.cat_core.evaluation.results import RUN, Results, SampleSet
from cat_diffusion.cat_core.pictures.tensors import channels_first
from cat_diffusion.nodes.host import model_files
from cat_diffusion.nodes.host.build import build_cat_model, build_clip, build_clip_vision
from cat_diffusion.nodes.host.cat_model import run_sem_inpainter
from cat_diffusion.nodes.host.clip import encode_image, encode_text

from . import DEMO_MODEL
from .feature_networks import build_extractor, build_networks, build_open_clip, with_cache
from .picture_bar import picture_bar


@dataclass(frozen=True)
class FeatureCosines:
    """How near observed and predicted features in the hole are to the true picture's."""

    lines: list[Line]
    histogram: dict  # edges, and counts of both kinds, for report.page


def command(arguments) -> int:
    """Evaluate what the arguments name; returns the exit code."""
    try:
        evaluate(arguments)
    except CatError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    return 0


def evaluate(arguments) -> None:
    """Check everything that can be checked first, measure, print, write."""
    folders = [Results.open(folder) for folder in arguments.results]
    samples, notes = sample_set(arguments, folders).read().of_all(folders, arguments.common)
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu")
    extractor = _or_note(
        notes,
        "FID, Local FID and similarity are",
        lambda: build_extractor(arguments.extractor, device),
    )
    clip = _or_note(notes, "CLIP score is", lambda: build_open_clip(arguments.clip_score, device))
    networks = build_networks(arguments, device, partial(_or_note, notes))
    if arguments.cache:
        options = {"cmmd": arguments.cmmd, "fd_dinov2": arguments.dinov2}
        named = {name: (network, options[name]) for name, network in networks.sets.items()}
        if extractor:
            named["fid"] = (extractor, arguments.extractor)
        cached = with_cache(arguments.cache, named)
        extractor = cached.pop("fid", None)
        networks = dataclasses.replace(networks, sets=cached)
    if arguments.extractor == f"clip:{DEMO_MODEL}":
        notes.append(
            "FID, Local FID and similarity use the demo model's CLIP, which knows drawn shapes "
            "only; for photographs give --extractor."
        )

    histogram = None
    with torch.inference_mode():
        with picture_bar(len(samples.records)) as bar:
            measured = measure(samples, folders, extractor, clip, bar.update, networks)
        lines, more_notes = estimates.summary(
            measured, arguments.resamples, arguments.fid_resamples, arguments.seed
        )
        if arguments.cosines:
            cosines = feature_cosines(
                arguments.cosines, samples, arguments.resamples, arguments.seed
            )
            lines += cosines.lines
            histogram = cosines.histogram
    notes += more_notes

    facts = {
        "pictures": len(samples.records),
        "manifest": samples.manifest,
        **_test_set(samples),
        "split": samples.split or "all",
        "hole": samples.hole,
        "size": samples.size,
        "extractor": arguments.extractor,
        "CLIP score by": arguments.clip_score or "none",
        **_asked_for(arguments),
    }
    print("\n" + tables.table(lines), *notes, sep="\n")
    if arguments.json:
        found = everything(measured, facts=facts, notes=notes, lines=lines, histogram=histogram)
        write(arguments.json, json.dumps(found, indent=1) + "\n")
    if arguments.csv:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([tables.COLUMNS, *tables.rows(lines)])
        write(arguments.csv, text.getvalue())
    breakdowns = {
        "By hole": breakdown.by_hole_size(measured, arguments.resamples, arguments.seed),
        "By name": breakdown.by_label(measured, arguments.resamples, arguments.seed),
    }
    if arguments.markdown:
        text = tables.markdown(lines, measured.names, facts, notes, breakdowns)
        write(arguments.markdown, text)
    if arguments.latex:
        write(arguments.latex, tables.latex(lines, measured.names, breakdowns))
    if arguments.html:
        path = arguments.html / "index.html"
        page = report.page(measured, lines, notes, facts, histogram, arguments.seed, breakdowns)
        write(path, page)
        print(f"Report: {path}")


def everything(
    measured: Measured,
    *,
    facts: dict,
    notes: Sequence[str],
    lines: Sequence[Line],
    histogram: dict | None,
) -> dict:
    """What --json writes: the table, and the numbers of every picture."""
    values = {}
    runs = {}
    for folder in measured.folders:
        path = folder.results.folder.as_posix()
        values[path] = folder.values
        runs[path] = folder.results.run
    plain_facts = {}
    for name, value in facts.items():
        plain_facts[name] = value if isinstance(value, int) else str(value)
    return {
        "facts": plain_facts,
        "runs": runs,
        "notes": notes,
        "lines": [dataclasses.asdict(line) for line in lines],
        "feature_cosines": histogram,
        "ids": [record.id for record in measured.samples.records],
        "values": values,
        "diversity": measured.diversity,
    }


def sample_set(arguments, folders: Sequence[Results]) -> SampleSet:
    """What to compare with: the options, else what all folders' run.json say."""
    manifest = _needed("manifest", arguments.manifest, folders)
    split = _chosen("split", arguments.split, folders)
    hole = _needed("hole", arguments.hole, folders)
    size = _needed("size", arguments.size, folders)
    if hole not in HOLES or not isinstance(size, int) or size < 1:
        raise EvaluationError(
            f"hole is {hole!r} and size {size!r}, expected {', '.join(HOLES)} and a number "
            f"of pixels. Correct {folders[0].folder / RUN} or the options."
        )
    return SampleSet(Path(manifest), split, hole, size)


def _needed(name: str, given, folders: Sequence[Results]):
    """An option's value; raises EvaluationError where neither it nor a folder says it."""
    value = _chosen(name, given, folders)
    if value is None:
        raise EvaluationError(f"There is no {name} in {folders[0].folder / RUN}. Give --{name}.")
    return value


def _chosen(name: str, given, folders: Sequence[Results]):
    """An option's value: as given, else as the folders say; None if nobody does."""
    told = {}
    for results in folders:
        if results.run.get(name) is not None:
            told[results.folder] = results.run[name]
    if given is None:
        if len(set(map(str, told.values()))) > 1:
            found = ", ".join(f"{folder} {value}" for folder, value in told.items())
            raise EvaluationError(
                f"The folders were not made alike: --{name} is {found}. Compare folders with the "
                f"same {name}, or give --{name} if it is only written differently."
            )
        return next(iter(told.values()), None)
    # A manifest may have moved, and any split of it may be measured.
    if name in ("hole", "size") and any(value != given for value in told.values()):
        values = ", ".join(map(str, told.values()))
        raise EvaluationError(f"--{name} {given} contradicts run.json ({values}). Leave it out.")
    return given


def feature_cosines(
    checkpoint: Path, samples: SampleSet, resamples: int, seed: int
) -> FeatureCosines:
    """Cosines of the features in the holes to the true ones, the paper's Fig. 4a.

    Args:
        checkpoint: a CAT checkpoint with CLIP and SemInpainter.
    """
    file = model_files.read_path(checkpoint)
    file.require("clip_vision", "clip_text", "sem_inpainter")
    vision = build_clip_vision(file)
    clip = build_clip(file)
    cat_model = build_cat_model(file)
    counts = {"observed": np.zeros(len(metrics.HISTOGRAM) - 1, int)}
    counts["predicted"] = counts["observed"].copy()
    means = {"observed": [], "predicted": []}
    with picture_bar(len(samples.records)) as bar:
        for record in samples.records:
            sample = samples.sample(record)
            seen = preprocess.clip_input(
                channels_first(sample.picture), channels_first(sample.hole)
            )
            observed, image = encode_image(vision, seen.masked_image)
            truth, _ = encode_image(vision, seen.image)
            text = encode_text(clip, record.label)
            predicted = run_sem_inpainter(cat_model, observed, image, text, seen.patch_mask)
            for kind, patches in (("observed", observed), ("predicted", predicted.patches)):
                cosines = metrics.masked_cosines(patches, truth, seen.patch_mask)
                counts[kind] += metrics.histogram(cosines)
                means[kind].append(float(cosines.mean()))
            bar.update()

    lines = []
    for kind, against in (("observed", None), ("predicted", means["observed"])):
        title = f"{kind}, {checkpoint.name}"
        values = means[kind]
        line = estimates.mean_line("feature_cosine", title, values, resamples, seed, against)
        lines.append(line)
    histogram = {
        "edges": metrics.HISTOGRAM.tolist(),
        "counts": {kind: numbers.tolist() for kind, numbers in counts.items()},
    }
    return FeatureCosines(lines, histogram)


def _test_set(samples: SampleSet) -> dict[str, str]:
    """The hash of a test set that was chosen by tools/prepare_data.py, for the report."""
    quoted = chosen.told(samples.manifest)
    return {} if quoted is None else {"test set": quoted}


def _asked_for(arguments) -> dict[str, object]:
    """The networks of metrics that are only measured on demand, for the report."""
    asked = {
        "CMMD by": arguments.cmmd,
        "DINOv2": arguments.dinov2,
        "LPIPS by": arguments.lpips,
        "score by": arguments.score,
    }
    return {name: value for name, value in asked.items() if value}


def _or_note(notes: list[str], what: str, build: Callable):
    """What `build` makes, or None and a note where a file or a library is missing.

    It is said at once, too: measuring may take hours.
    """
    try:
        return build()
    except Missing as error:
        notes.append(f"{what} left out: {error}")
        print(notes[-1], file=sys.stderr, flush=True)
        return None


def write(path: Path, text: str) -> None:
    """Write a text, whole or not at all; raises EvaluationError."""
    try:
        files.write_text(path, text)
    except OSError as error:
        raise EvaluationError(
            f"Cannot write {path}: {error}. Check free space and permissions."
        ) from error
