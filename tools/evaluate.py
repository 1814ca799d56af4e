"""Measure folders of finished pictures: FID, Local FID, CLIP score, background, diversity, with intervals.

    python tools/evaluate.py results/cat --extractor inception:weights-inception-2015-12-05-6726825d.pth \\
        --clip-score ViT-L-14-quickgelu:openai --html report
    python tools/evaluate.py results/plain results/cat --json measured.json --csv measured.csv

A results folder, written by tools/generate.py, holds <id>.png for each record and run.json with manifest, split, hole and
size. Differences are to the first folder. Folders that were made alike but for the seed also give diversity.
Needs requirements-evaluate.txt. Nothing is downloaded at any time.
"""

import argparse
import csv
import dataclasses
import io
import json
import os
import sys
import time
from pathlib import Path

import inside

DEMO_MODEL = inside.ROOT / "models/cat_demo_model.safetensors"


def command_line() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS",
                        help="folders of finished pictures; differences are to the first")
    parser.add_argument("--manifest", type=Path, help="the records they were made of (default: run.json's)")
    parser.add_argument("--split", help="which of the manifest's records (default: run.json's, else all)")
    parser.add_argument("--hole", choices=("segment", "box"), help="how holes were cut (default: run.json's)")
    parser.add_argument("--size", type=int, help="side of the pictures in pixels (default: run.json's)")
    parser.add_argument("--common", action="store_true", help="evaluate only the pictures that all folders have")
    parser.add_argument("--extractor", default=f"clip:{DEMO_MODEL}", metavar="KIND:FILE",
                        help="network of FID, Local FID and similarity: inception:FILE with torch-fidelity's weights, or "
                             "clip:FILE with a CLIP vision file or a CAT checkpoint (default: the demo model's, which knows "
                             "drawn shapes only)")
    parser.add_argument("--clip-score", metavar="MODEL:PRETRAINED",
                        help="open_clip model, and a weights file or a tag that was downloaded before; or local-dir:FOLDER")
    parser.add_argument("--cosines", type=Path, metavar="FILE",
                        help="also compare observed and predicted features with the true ones, by this CAT checkpoint")
    parser.add_argument("--resamples", type=int, default=1000, metavar="N",
                        help="bootstrap resamples of means; 0 = no intervals (default: 1000)")
    parser.add_argument("--fid-resamples", type=int, metavar="N",
                        help="the same of FID (default: 100 up to 512 features, else 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples and of the random pictures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, with the numbers of every picture")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table")
    parser.add_argument("--html", type=Path, metavar="FOLDER",
                        help="write index.html: table, curves, best, worst and random pictures")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    inside.add_host_options(parser)
    return parser


def main() -> int:
    parser = command_line()
    arguments = parser.parse_args()
    inside.ensure_host(parser, arguments, __file__, "evaluate")
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when open_clip's and ComfyUI's libraries are imported
    import torch
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    inside.load_pack(arguments.cpu or not torch.cuda.is_available())
    from cat_diffusion.cat_core.evaluation.metrics import EvaluationError
    from cat_diffusion.cat_core.training.manifest import ManifestError
    from cat_diffusion.cat_core.weights import WeightsError
    try:
        evaluate(arguments)
    except (EvaluationError, ManifestError, WeightsError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    return 0


def evaluate(arguments) -> None:
    """Check everything that can be checked first, measure, print, write."""
    import torch
    from cat_diffusion.cat_core.evaluation import measure, report
    from cat_diffusion.cat_core.evaluation.results import Results

    folders = [Results.open(folder) for folder in arguments.results]
    samples, notes = sample_set(arguments, folders).read().of_all(folders, arguments.common)
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu")
    extractor = _or_note(notes, "FID, Local FID and similarity are", lambda: build_extractor(arguments.extractor, device))
    clip = _or_note(notes, "CLIP score is", lambda: build_clip(arguments.clip_score, device))
    if arguments.extractor == f"clip:{DEMO_MODEL}":
        notes.append("FID, Local FID and similarity use the demo model's CLIP, which knows drawn shapes only; for photographs "
                     "give --extractor.")

    with torch.inference_mode():
        measured = measure.measure(samples, folders, extractor, clip, progress())
        lines, more = measure.summary(measured, arguments.resamples, arguments.fid_resamples, arguments.seed)
        cosines = (feature_cosines(arguments.cosines, samples, arguments.resamples, arguments.seed)
                   if arguments.cosines else None)
    lines, notes = lines + (cosines["lines"] if cosines else []), notes + more
    facts = {"pictures": len(samples.records), "manifest": samples.manifest, "split": samples.split or "all",
             "hole": samples.hole, "size": samples.size, "extractor": arguments.extractor,
             "CLIP score by": arguments.clip_score or "none"}
    print("\n" + report.table(lines), *notes, sep="\n")
    histogram = cosines and cosines["histogram"]
    if arguments.json:
        everything = {"facts": {key: value if isinstance(value, int) else str(value) for key, value in facts.items()},
                      "runs": {results.folder.as_posix(): results.run for results in folders}, "notes": notes,
                      "lines": [dataclasses.asdict(line) for line in lines], "feature_cosines": histogram,
                      "ids": [record.id for record in samples.records],
                      "values": {folder.results.folder.as_posix(): folder.values for folder in measured.folders},
                      "diversity": measured.diversity}
        write(arguments.json, json.dumps(everything, indent=1) + "\n")
    if arguments.csv:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([report.COLUMNS, *report.rows(lines)])
        write(arguments.csv, text.getvalue())
    if arguments.html:
        write(arguments.html / "index.html", report.page(measured, lines, notes, facts, histogram, arguments.seed))
        print(f"Report: {arguments.html / 'index.html'}")


def sample_set(arguments, folders):
    """What to compare with: the options, else what all folders' run.json say."""
    from cat_diffusion.cat_core.evaluation.metrics import EvaluationError
    from cat_diffusion.cat_core.evaluation.results import SampleSet
    from cat_diffusion.cat_core.training.samples import VARIANTS

    chosen = {}
    for name in ("manifest", "split", "hole", "size"):
        given = getattr(arguments, name)
        told = {results.folder: results.run[name] for results in folders if results.run.get(name) is not None}
        if given is None and len(set(map(str, told.values()))) > 1:
            found = ", ".join(f"{folder} {value}" for folder, value in told.items())
            raise EvaluationError(f"The folders were not made alike: --{name} is {found}. Compare folders with the same {name}, "
                                  f"or give --{name} if it is only written differently.")
        chosen[name] = given if given is not None else next(iter(told.values()), None)
        if name in ("hole", "size") and given is not None and any(value != given for value in told.values()):
            raise EvaluationError(f"--{name} {given} contradicts run.json ({', '.join(map(str, told.values()))}). Leave it out.")
        if chosen[name] is None and name != "split":
            raise EvaluationError(f"There is no {name} in {folders[0].folder / 'run.json'}. Give --{name}.")
    if chosen["hole"] not in VARIANTS or not isinstance(chosen["size"], int) or chosen["size"] < 1:
        raise EvaluationError(f"hole is {chosen['hole']!r} and size {chosen['size']!r}, expected {' or '.join(VARIANTS)} and a "
                              f"number of pixels. Correct {folders[0].folder / 'run.json'} or the options.")
    return SampleSet(Path(chosen["manifest"]), chosen["split"], chosen["hole"], chosen["size"])


# Networks -----------------------------------------------------------------------------------------------------------


def build_extractor(text: str, device):
    """KIND:FILE -> a network that makes features of pictures."""
    from cat_diffusion.cat_core.evaluation.features import Inception
    from cat_diffusion.cat_core.evaluation.metrics import EvaluationError

    kind, _, file = text.partition(":")
    if kind == "inception" and file:
        return Inception(Path(file), device)
    if kind == "clip" and file:
        return HostClip(Path(file))
    raise EvaluationError(f"--extractor is {text!r}, expected inception:FILE or clip:FILE.")


def build_clip(text: str | None, device):
    """MODEL:PRETRAINED -> the network of the CLIP score."""
    from cat_diffusion.cat_core.evaluation.features import OpenClip
    from cat_diffusion.cat_core.evaluation.metrics import EvaluationError, Missing

    if text is None:
        raise Missing("it needs --clip-score MODEL:PRETRAINED.")
    if text.startswith("local-dir:"):
        return OpenClip(text, None, device)
    model, _, pretrained = text.partition(":")
    if not model or not pretrained:
        raise EvaluationError(f"--clip-score is {text!r}, expected MODEL:FILE, MODEL:TAG or local-dir:FOLDER, such as "
                              "ViT-L-14-quickgelu:openai.")
    return OpenClip(model, pretrained, device)


class HostClip:
    """The image feature of a CLIP vision file (B, D), by the host, in fp32; pictures go through preprocess.clip_input."""

    def __init__(self, path: Path):
        from cat_diffusion.nodes import builders, host

        file = host.read_path(path)
        file.require("clip_vision")
        tensors = {key: tensor.float() for key, tensor in file.parts["clip_vision"].items()}
        self.vision = builders.build_clip_vision(dataclasses.replace(file, parts={"clip_vision": tensors}))

    def __call__(self, pictures):
        from cat_diffusion.nodes import host

        return host.encode_image(self.vision, self.pixels(pictures))[1]

    @staticmethod
    def pixels(pictures):
        """Pillow pictures of any size -> (B, 3, 224, 224) uint8."""
        import torch
        from cat_diffusion.cat_core import preprocess

        return torch.cat([preprocess.clip_input(_tensor(picture)).image for picture in pictures])


def feature_cosines(checkpoint: Path, samples, resamples: int, seed: int) -> dict:
    """How near observed and predicted features in the hole are to the true picture's (the paper's Fig. 4a)."""
    from cat_diffusion.cat_core import preprocess
    from cat_diffusion.cat_core.evaluation import measure, metrics
    from cat_diffusion.nodes import builders, host

    file = host.read_path(checkpoint)
    file.require("clip_vision", "clip_text", "sem_inpainter")
    vision, clip, cat_model = builders.build_clip_vision(file), builders.build_clip(file), builders.build_cat_model(file)
    counts, means = {"observed": 0, "predicted": 0}, {"observed": [], "predicted": []}
    show = progress()
    for done, record in enumerate(samples.records, 1):
        sample = samples.sample(record)
        seen = preprocess.clip_input(_tensor(sample.picture), _tensor(sample.hole))
        observed, image = host.encode_image(vision, seen.masked_image)
        truth, _ = host.encode_image(vision, seen.image)
        predicted = host.run_sem_inpainter(cat_model, observed, image, host.encode_text(clip, record.label), seen.patch_mask)
        for kind, patches in (("observed", observed), ("predicted", predicted)):
            found = metrics.masked_cosines(patches, truth, seen.patch_mask)
            counts[kind] = counts[kind] + metrics.histogram(found)
            means[kind].append(float(found.mean()))
        show(done, len(samples.records))
    lines = [measure.mean_line("feature_cosine", f"{kind}, {checkpoint.name}", values, resamples, seed,
                               means["observed"] if kind == "predicted" else None)
             for kind, values in means.items()]
    return {"lines": lines, "histogram": {"edges": metrics.HISTOGRAM.tolist(),
                                          "counts": {kind: found.tolist() for kind, found in counts.items()}}}


def _tensor(picture):
    """A Pillow picture -> (1, 1 or 3, H, W) in [0, 1]."""
    import numpy as np
    import torch

    array = np.array(picture)
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)[None] / 255


# Small things -------------------------------------------------------------------------------------------------------


def _or_note(notes: list[str], what: str, build):
    """What `build` makes, or None and a note where something is not installed."""
    from cat_diffusion.cat_core.evaluation.metrics import Missing

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
            print(f"{done:,} of {total:,} pictures, {done / max(now - start, 1e-9):.1f} a second   ",
                  end="\r" if terminal and done < total else "\n", flush=True)

    return show


def write(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it."""
    from cat_diffusion.cat_core.evaluation.metrics import EvaluationError

    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise EvaluationError(f"Cannot write {path}: {error}. Check free space and permissions.") from error


if __name__ == "__main__":
    inside.interruptible(main)
