"""Write a training manifest from a data set; tools/prepare_data.py's work."""

import itertools
import os
import sys
import time
import warnings
from pathlib import Path

from PIL import Image

from cat_diffusion.cat_core.data import manifest, masks, tally
from cat_diffusion.cat_core.data.folder import Folder, triples

from . import data_sources


def command(arguments) -> int:
    """Prepare what the arguments name; returns the exit code."""
    sys.stdout.reconfigure(errors="backslashreplace")  # ids may hold what a terminal cannot show
    warnings.simplefilter(
        "ignore", SyntaxWarning
    )  # about backslashes in list files, a page of them
    try:
        return prepare(arguments)
    except (manifest.ManifestError, data_sources.SourceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"\nstopped; {arguments.out} was not written", file=sys.stderr)
    return 1


def prepare(arguments) -> int:
    """Read the source, write what is usable and report the rest."""
    out, report = arguments.out, tally.Tally()
    report_path = out.with_name(f"{out.name}.report.txt")
    drawn = out.with_name(f"{out.stem}_masks")  # where COCO's masks go
    for path in (out, report_path, *([drawn] if arguments.source == "coco" else [])):
        if path.exists() and not arguments.overwrite:
            raise manifest.ManifestError(
                f"{path} exists already and was not touched. Give --overwrite to replace it."
            )

    for name in ("classes", "annotations", "instances", "captions", "list"):
        path = getattr(arguments, name, None)
        if path is not None and not path.is_file():
            raise data_sources.SourceError(
                f"--{name} {path} is not a file, expected one; see --help."
            )

    def folder(path: Path) -> Folder:
        return data_sources.locate(path, out)

    if arguments.source == "openimages":
        found = data_sources.openimages(
            arguments.classes,
            arguments.annotations,
            [folder(path) for path in arguments.images],
            [folder(path) for path in arguments.masks],
            arguments.split,
        )
    elif arguments.source == "coco":
        found = data_sources.coco(
            arguments.instances,
            arguments.captions,
            folder(arguments.images),
            Folder(drawn, drawn.name),
            arguments.split,
        )
    elif arguments.source == "folder":
        found = triples(folder(arguments.data), arguments.split)
    else:
        found = data_sources.official(
            arguments.list, folder(arguments.images), folder(arguments.masks), arguments.split
        )

    records = usable(_progress(found, report), report, arguments)
    first = next(records, None)
    if first is not None:
        manifest.write(out, itertools.chain([first], records))
    out.parent.mkdir(parents=True, exist_ok=True)
    report_path.write_text(f"{report}\n", encoding="utf-8")
    print(report)
    if first is None:
        print(
            f"error: no usable sample in {arguments.source}; {out} was not written, {report_path} says why",
            file=sys.stderr,
        )
        return 1
    print(f"Wrote {out} and {report_path}.")
    return 0


def usable(found, report, arguments):
    """Yield the records of the samples that can be trained on; count and name the others in `report`."""
    folder, seen = arguments.out.parent, set()
    least, most = getattr(arguments, "min_area", 0.0), getattr(arguments, "max_area", 1.0)
    for sample in found:
        record = sample.record
        if record is None:
            report.skip(sample.reason, sample.id)
            continue
        try:
            if record.id in seen:
                raise masks.SampleError("duplicate id")
            if record.box is not None:
                x0, y0, x1, y1 = record.box
                area = (x1 - x0) * (y1 - y0)
                if area < least:
                    raise masks.SampleError(f"smaller than {least:g} of the image")
                if area > most:
                    raise masks.SampleError(f"larger than {most:g} of the image")
            if not os.path.isfile(folder / record.image):
                raise masks.SampleError("missing image")
            if sample.draw is not None:
                _save(sample.draw(), folder / record.mask)
            elif record.mask is not None and not os.path.isfile(folder / record.mask):
                raise masks.SampleError("missing mask")
            if arguments.check:
                _check(record, folder)
        except masks.SampleError as error:
            report.skip(error.reason, sample.id)
            continue
        seen.add(record.id)
        report.keep()
        yield record


def _check(record, folder: Path) -> None:
    """Decode a record's pictures and let Pillow verify their checksums; raises SampleError."""
    masks.load(record, folder)
    for kind, name in (("image", record.image), ("mask", record.mask)):
        try:
            if name is not None:
                with Image.open(folder / name) as file:
                    file.verify()
        except Exception as error:  # whatever Pillow raises for what is broken
            raise masks.SampleError(f"corrupt {kind}", str(error)) from error


def _save(mask, path: Path) -> None:
    """Write a mask as a one-bit PNG under a temporary name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    mask.convert("1").save(partial, format="PNG")
    os.replace(partial, path)


def _progress(found, report):
    """Pass everything on and say how far it is, on a terminal in one line."""
    start = last = time.monotonic()
    terminal = sys.stdout.isatty()
    for sample in found:
        yield sample
        now = time.monotonic()
        if now - last > (0.2 if terminal else 10):
            last, skipped = now, sum(report.skipped.values())
            print(
                f"{report.kept:,} kept, {skipped:,} skipped, {(report.kept + skipped) / (now - start):,.0f} a second   ",
                end="\r" if terminal else "\n",
                flush=True,
            )
    if terminal:
        print(" " * 70, end="\r")
