"""Measure folders of finished pictures and report what they are worth; tools/evaluate.py's work."""

import csv
import dataclasses
import io
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from cat_diffusion.cat_core import files, preprocess
from cat_diffusion.cat_core.data.masks import VARIANTS
from cat_diffusion.cat_core.errors import CatError
from cat_diffusion.cat_core.evaluation import measure, metrics, report
from cat_diffusion.cat_core.evaluation.extractors import Inception, OpenClip
from cat_diffusion.cat_core.evaluation.metrics import EvaluationError, Missing
from cat_diffusion.cat_core.evaluation.results import Results, SampleSet
from cat_diffusion.nodes.host import model_files
from cat_diffusion.nodes.host.build import build_cat_model, build_clip, build_clip_vision
from cat_diffusion.nodes.host.cat_model import run_sem_inpainter
from cat_diffusion.nodes.host.clip import encode_image, encode_text
from comfyui import ROOT

DEMO_MODEL = ROOT / "models/cat_demo_model.safetensors"


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
    clip = _or_note(notes, "CLIP score is", lambda: open_clip_of(arguments.clip_score, device))
    if arguments.extractor == f"clip:{DEMO_MODEL}":
        notes.append(
            "FID, Local FID and similarity use the demo model's CLIP, which knows drawn shapes only; for photographs "
            "give --extractor."
        )

    with torch.inference_mode():
        measured = measure.measure(samples, folders, extractor, clip, progress())
        lines, more = measure.summary(
            measured, arguments.resamples, arguments.fid_resamples, arguments.seed
        )
        cosines = (
            feature_cosines(arguments.cosines, samples, arguments.resamples, arguments.seed)
            if arguments.cosines
            else None
        )
    lines, notes = lines + (cosines["lines"] if cosines else []), notes + more
    facts = {
        "pictures": len(samples.records),
        "manifest": samples.manifest,
        "split": samples.split or "all",
        "hole": samples.hole,
        "size": samples.size,
        "extractor": arguments.extractor,
        "CLIP score by": arguments.clip_score or "none",
    }
    print("\n" + report.table(lines), *notes, sep="\n")
    histogram = cosines and cosines["histogram"]
    if arguments.json:
        everything = {
            "facts": {
                key: value if isinstance(value, int) else str(value) for key, value in facts.items()
            },
            "runs": {results.folder.as_posix(): results.run for results in folders},
            "notes": notes,
            "lines": [dataclasses.asdict(line) for line in lines],
            "feature_cosines": histogram,
            "ids": [record.id for record in samples.records],
            "values": {
                folder.results.folder.as_posix(): folder.values for folder in measured.folders
            },
            "diversity": measured.diversity,
        }
        write(arguments.json, json.dumps(everything, indent=1) + "\n")
    if arguments.csv:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([report.COLUMNS, *report.rows(lines)])
        write(arguments.csv, text.getvalue())
    if arguments.html:
        write(
            arguments.html / "index.html",
            report.page(measured, lines, notes, facts, histogram, arguments.seed),
        )
        print(f"Report: {arguments.html / 'index.html'}")


def sample_set(arguments, folders):
    """What to compare with: the options, else what all folders' run.json say."""

    chosen = {}
    for name in ("manifest", "split", "hole", "size"):
        given = getattr(arguments, name)
        told = {
            results.folder: results.run[name]
            for results in folders
            if results.run.get(name) is not None
        }
        if given is None and len(set(map(str, told.values()))) > 1:
            found = ", ".join(f"{folder} {value}" for folder, value in told.items())
            raise EvaluationError(
                f"The folders were not made alike: --{name} is {found}. Compare folders with the same {name}, "
                f"or give --{name} if it is only written differently."
            )
        chosen[name] = given if given is not None else next(iter(told.values()), None)
        if (
            name in ("hole", "size")
            and given is not None
            and any(value != given for value in told.values())
        ):
            raise EvaluationError(
                f"--{name} {given} contradicts run.json ({', '.join(map(str, told.values()))}). Leave it out."
            )
        if chosen[name] is None and name != "split":
            raise EvaluationError(
                f"There is no {name} in {folders[0].folder / 'run.json'}. Give --{name}."
            )
    if chosen["hole"] not in VARIANTS or not isinstance(chosen["size"], int) or chosen["size"] < 1:
        raise EvaluationError(
            f"hole is {chosen['hole']!r} and size {chosen['size']!r}, expected {' or '.join(VARIANTS)} and a "
            f"number of pixels. Correct {folders[0].folder / 'run.json'} or the options."
        )
    return SampleSet(Path(chosen["manifest"]), chosen["split"], chosen["hole"], chosen["size"])


# Networks -----------------------------------------------------------------------------------------------------------


def build_extractor(text: str, device):
    """KIND:FILE -> a network that makes features of pictures."""

    kind, _, file = text.partition(":")
    if kind == "inception" and file:
        return Inception(Path(file), device)
    if kind == "clip" and file:
        return HostClip(Path(file))
    raise EvaluationError(f"--extractor is {text!r}, expected inception:FILE or clip:FILE.")


def open_clip_of(text: str | None, device):
    """MODEL:PRETRAINED -> the network of the CLIP score."""

    if text is None:
        raise Missing("it needs --clip-score MODEL:PRETRAINED.")
    if text.startswith("local-dir:"):
        return OpenClip(text, None, device)
    model, _, pretrained = text.partition(":")
    if not model or not pretrained:
        raise EvaluationError(
            f"--clip-score is {text!r}, expected MODEL:FILE, MODEL:TAG or local-dir:FOLDER, such as "
            "ViT-L-14-quickgelu:openai."
        )
    return OpenClip(model, pretrained, device)


class HostClip:
    """The image feature of a CLIP vision file (B, D), by the host, in fp32; pictures go through preprocess.clip_input."""

    def __init__(self, path: Path):

        file = model_files.read_path(path)
        file.require("clip_vision")
        tensors = {key: tensor.float() for key, tensor in file.parts["clip_vision"].items()}
        self.vision = build_clip_vision(dataclasses.replace(file, parts={"clip_vision": tensors}))

    def __call__(self, pictures):

        return encode_image(self.vision, self.pixels(pictures))[1]

    @staticmethod
    def pixels(pictures):
        """Pillow pictures of any size -> (B, 3, 224, 224) uint8."""

        return torch.cat([preprocess.clip_input(_tensor(picture)).image for picture in pictures])


def feature_cosines(checkpoint: Path, samples, resamples: int, seed: int) -> dict:
    """How near observed and predicted features in the hole are to the true picture's (the paper's Fig. 4a)."""

    file = model_files.read_path(checkpoint)
    file.require("clip_vision", "clip_text", "sem_inpainter")
    vision, clip, cat_model = build_clip_vision(file), build_clip(file), build_cat_model(file)
    counts, means = {"observed": 0, "predicted": 0}, {"observed": [], "predicted": []}
    show = progress()
    for done, record in enumerate(samples.records, 1):
        sample = samples.sample(record)
        seen = preprocess.clip_input(_tensor(sample.picture), _tensor(sample.hole))
        observed, image = encode_image(vision, seen.masked_image)
        truth, _ = encode_image(vision, seen.image)
        predicted = run_sem_inpainter(
            cat_model, observed, image, encode_text(clip, record.label), seen.patch_mask
        )
        for kind, patches in (("observed", observed), ("predicted", predicted)):
            found = metrics.masked_cosines(patches, truth, seen.patch_mask)
            counts[kind] = counts[kind] + metrics.histogram(found)
            means[kind].append(float(found.mean()))
        show(done, len(samples.records))
    lines = [
        measure.mean_line(
            "feature_cosine",
            f"{kind}, {checkpoint.name}",
            values,
            resamples,
            seed,
            means["observed"] if kind == "predicted" else None,
        )
        for kind, values in means.items()
    ]
    return {
        "lines": lines,
        "histogram": {
            "edges": metrics.HISTOGRAM.tolist(),
            "counts": {kind: found.tolist() for kind, found in counts.items()},
        },
    }


def _tensor(picture):
    """A Pillow picture -> (1, 1 or 3, H, W) in [0, 1]."""

    array = np.array(picture)
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)[None] / 255


# Small things -------------------------------------------------------------------------------------------------------


def _or_note(notes: list[str], what: str, build):
    """What `build` makes, or None and a note where something is not installed."""

    try:
        return build()
    except Missing as error:
        notes.append(f"{what} left out: {error}")


def progress():
    """Says how far it is: on a terminal in one line, else every 30 seconds."""
    start = last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        now, terminal = time.monotonic(), sys.stdout.isatty()
        if done == total or now - last > (0.2 if terminal else 30):
            last = now
            print(
                f"{done:,} of {total:,} pictures, {done / max(now - start, 1e-9):.1f} a second   ",
                end="\r" if terminal and done < total else "\n",
                flush=True,
            )

    return show


def write(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it."""

    try:
        files.write_text(path, text)
    except OSError as error:
        raise EvaluationError(
            f"Cannot write {path}: {error}. Check free space and permissions."
        ) from error
