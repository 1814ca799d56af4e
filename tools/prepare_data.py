"""Write a training manifest for OpenImages, COCO, a plain folder or the official repository's lists.

    python tools/prepare_data.py openimages --classes class-descriptions-boxable.csv \\
        --annotations train-annotations-object-segmentation.csv --images train --masks masks --out train.jsonl
    python tools/prepare_data.py coco --instances instances_train2017.json --images train2017 --out coco.jsonl
    python tools/prepare_data.py folder --data pictures --out pictures/manifest.jsonl
    python tools/prepare_data.py official --list openimages_train.txt --images . --masks . --out train.jsonl

A manifest names pictures relative to its own folder, so put it in a folder above the data. Bad samples are skipped,
counted and named in OUT.report.txt beside it. Needs Pillow; coco also needs pycocotools (requirements-train.txt).
"""

import argparse
import itertools
import os
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    arguments = parse()
    sys.path.insert(0, str(ROOT))
    sys.stdout.reconfigure(errors="backslashreplace")  # ids may hold what a terminal cannot show
    warnings.simplefilter("ignore", SyntaxWarning)  # about backslashes in list files, a page of them
    try:
        import data_sources as sources
        from cat_core.training import manifest
    except ModuleNotFoundError as error:
        print(f"error: {sys.executable} has no {error.name}; run this with ComfyUI's Python", file=sys.stderr)
        return 1
    try:
        return prepare(manifest, sources, arguments)
    except (manifest.ManifestError, sources.SourceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"\nstopped; {arguments.out} was not written", file=sys.stderr)
    return 1


def parse() -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", type=Path, required=True, metavar="MANIFEST", help="file to write (.jsonl)")
    common.add_argument("--split", choices=("train", "validation", "test"), default="train",
                        help="what the samples are for (default: train)")
    common.add_argument("--check", action="store_true",
                        help="decode every picture and mask; without it only their existence is checked")
    common.add_argument("--overwrite", action="store_true", help="replace a manifest that exists")
    areas = argparse.ArgumentParser(add_help=False)
    areas.add_argument("--min-area", type=_share, default=0.0, metavar="SHARE",
                       help="skip objects whose box covers less of the image, 0 to 1 (default: no limit)")
    areas.add_argument("--max-area", type=_share, default=1.0, metavar="SHARE",
                       help="skip objects whose box covers more of the image, 0 to 1 (default: no limit)")

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="source", required=True)
    command = commands.add_parser("openimages", parents=[common, areas], help="OpenImages V6: official CSV files and masks")
    command.add_argument("--classes", type=Path, required=True, help="class-descriptions-boxable.csv")
    command.add_argument("--annotations", type=Path, required=True, help="train-annotations-object-segmentation.csv")
    command.add_argument("--images", type=Path, nargs="+", required=True, help="folders with ImageID.jpg")
    command.add_argument("--masks", type=Path, nargs="+", required=True,
                         help="folders with the mask PNGs, flat or in subfolders by first hex digit")
    command = commands.add_parser("coco", parents=[common, areas], help="COCO instances; draws the masks beside the manifest")
    command.add_argument("--instances", type=Path, required=True, help="instances_*.json")
    command.add_argument("--captions", type=Path, help="captions_*.json of the same images")
    command.add_argument("--images", type=Path, required=True, help="folder with the images")
    command = commands.add_parser("folder", parents=[common], help="image, mask and label side by side in one folder")
    command.add_argument("--data", type=Path, required=True,
                         help="folder with LABEL_image.png and LABEL_mask.png, or NAME.jpg, NAME_mask.png and NAME.txt")
    command = commands.add_parser("official", parents=[common, areas], help="list files of the official repository")
    command.add_argument("--list", type=Path, required=True, help="text file with one Python dict a line")
    command.add_argument("--images", type=Path, required=True, help="folder that the list's image paths start from")
    command.add_argument("--masks", type=Path, required=True, help="folder that the list's mask paths start from")
    arguments = parser.parse_args()
    if "min_area" in arguments and arguments.min_area > arguments.max_area:
        parser.error(f"--min-area {arguments.min_area} is above --max-area {arguments.max_area}, so nothing would be left")
    return arguments


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share of the image, expected 0 to 1")
    return value


def prepare(manifest, sources, arguments) -> int:
    """Read the source, write what is usable and report the rest."""
    out, report = arguments.out, manifest.Report()
    report_path = out.with_name(f"{out.name}.report.txt")
    drawn = out.with_name(f"{out.stem}_masks")  # where COCO's masks go
    for path in (out, report_path, *([drawn] if arguments.source == "coco" else [])):
        if path.exists() and not arguments.overwrite:
            raise manifest.ManifestError(f"{path} exists already and was not touched. Give --overwrite to replace it.")

    for name in ("classes", "annotations", "instances", "captions", "list"):
        path = getattr(arguments, name, None)
        if path is not None and not path.is_file():
            raise sources.SourceError(f"--{name} {path} is not a file, expected one; see --help.")

    from cat_core.training.folder import triples

    def folder(path: Path) -> sources.Folder:
        return sources.locate(path, out)

    if arguments.source == "openimages":
        found = sources.openimages(arguments.classes, arguments.annotations, [folder(path) for path in arguments.images],
                                   [folder(path) for path in arguments.masks], arguments.split)
    elif arguments.source == "coco":
        found = sources.coco(arguments.instances, arguments.captions, folder(arguments.images),
                             sources.Folder(drawn, drawn.name), arguments.split)
    elif arguments.source == "folder":
        found = triples(folder(arguments.data), arguments.split)
    else:
        found = sources.official(arguments.list, folder(arguments.images), folder(arguments.masks), arguments.split)

    records = usable(manifest, _progress(found, report), report, arguments)
    first = next(records, None)
    if first is not None:
        manifest.write(out, itertools.chain([first], records))
    out.parent.mkdir(parents=True, exist_ok=True)
    report_path.write_text(f"{report}\n", encoding="utf-8")
    print(report)
    if first is None:
        print(f"error: no usable sample in {arguments.source}; {out} was not written, {report_path} says why", file=sys.stderr)
        return 1
    print(f"Wrote {out} and {report_path}.")
    return 0


def usable(manifest, found, report, arguments):
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
                raise manifest.SampleError("duplicate id")
            if record.box is not None:
                x0, y0, x1, y1 = record.box
                area = (x1 - x0) * (y1 - y0)
                if area < least:
                    raise manifest.SampleError(f"smaller than {least:g} of the image")
                if area > most:
                    raise manifest.SampleError(f"larger than {most:g} of the image")
            if not os.path.isfile(folder / record.image):
                raise manifest.SampleError("missing image")
            if sample.draw is not None:
                _save(sample.draw(), folder / record.mask)
            elif record.mask is not None and not os.path.isfile(folder / record.mask):
                raise manifest.SampleError("missing mask")
            if arguments.check:
                _check(manifest, record, folder)
        except manifest.SampleError as error:
            report.skip(error.reason, sample.id)
            continue
        seen.add(record.id)
        report.keep()
        yield record


def _check(manifest, record, folder: Path) -> None:
    """Decode a record's pictures and let Pillow verify their checksums; raises SampleError."""
    from PIL import Image

    manifest.load(record, folder)
    for kind, name in (("image", record.image), ("mask", record.mask)):
        try:
            if name is not None:
                with Image.open(folder / name) as file:
                    file.verify()
        except Exception as error:  # whatever Pillow raises for what is broken
            raise manifest.SampleError(f"corrupt {kind}", str(error)) from error


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
            print(f"{report.kept:,} kept, {skipped:,} skipped, {(report.kept + skipped) / (now - start):,.0f} a second   ",
                  end="\r" if terminal else "\n", flush=True)
    if terminal:
        print(" " * 70, end="\r")


if __name__ == "__main__":
    sys.exit(main())
