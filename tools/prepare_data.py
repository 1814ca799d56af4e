"""Write a training manifest for OpenImages, COCO, a folder or the official repository's lists.

    python tools/prepare_data.py openimages --classes class-descriptions-boxable.csv \\
        --annotations train-annotations-object-segmentation.csv \\
        --images train --masks masks --out train.jsonl
    python tools/prepare_data.py coco --instances instances_train2017.json \\
        --images train2017 --out coco.jsonl
    python tools/prepare_data.py folder --data pictures --out pictures/manifest.jsonl
    python tools/prepare_data.py official --list openimages_train.txt \\
        --images . --masks . --out train.jsonl
    python tools/prepare_data.py webdataset --shard shards/train-*.tar --out train.jsonl
    python tools/prepare_data.py testset --from validation.jsonl --count 1000 --out test.jsonl

A manifest names pictures relative to its own folder, so put it in a folder above the data. Bad
samples are skipped, counted and named in OUT.report.txt beside it. Needs Pillow and tqdm,
which ComfyUI's Python has; coco also needs numpy and pycocotools (requirements-coco.txt).
"""

import argparse
from pathlib import Path

from comfyui import launch

PAPER = {"paper-openimages": 13_400, "paper-coco": 9_311}  # samples of its test sets


def main() -> int:
    parser = command_line()
    arguments = parser.parse_args()
    if "min_area" in arguments and arguments.min_area > arguments.max_area:
        parser.error(
            f"--min-area {arguments.min_area} is above --max-area {arguments.max_area}, "
            "so nothing would be left"
        )
    modules = {"PIL": "Pillow", "tqdm": "tqdm"}
    if arguments.source == "coco":
        modules["numpy"] = "numpy"
    launch.enter_python(parser, arguments, modules)
    with launch.importing():
        if arguments.source == "testset":
            from training import chosen_test_set as body
        else:
            from training import preparation as body

    return body.command(arguments)


def command_line() -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="source", required=True)
    common = common_options()
    areas = area_options()
    values = value_options()
    borders = border_options()
    add_openimages(commands, [common, areas, borders, values])
    add_coco(commands, [common, areas, borders])
    add_folder(commands, [common, values])
    add_official(commands, [common, areas, borders, values])
    add_webdataset(commands, [common, areas, borders, values])
    add_testset(commands, [areas])
    return parser


def common_options() -> argparse.ArgumentParser:
    """What all sources have in common."""
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--out", type=Path, required=True, metavar="MANIFEST", help="file to write (.jsonl)"
    )
    options.add_argument(
        "--split",
        choices=("train", "validation", "test"),
        default="train",
        help="what the samples are for (default: train)",
    )
    options.add_argument(
        "--check",
        action="store_true",
        help="decode every picture and mask; without it only their existence is checked",
    )
    options.add_argument(
        "--turn-masks",
        action="store_true",
        help="masks and boxes are drawn on the images as stored, before their EXIF data turns "
        "them: turn them too; turned masks go beside the manifest",
    )
    options.add_argument(
        "--shards",
        type=shard_size,
        nargs="?",
        const=1000,
        metavar="MB",
        help="copy pictures and masks into tar shards of about this size (default: 1000) beside "
        "the manifest, which webdataset reads too: few large files instead of many small ones",
    )
    options.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes that draw masks and decode pictures (default: the cores of this machine)",
    )
    options.add_argument("--overwrite", action="store_true", help="replace a manifest that exists")
    launch.add_host_options(options, installs=False)
    return options


def area_options() -> argparse.ArgumentParser:
    """How large objects must be."""
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--min-area",
        type=share,
        default=0.0,
        metavar="SHARE",
        help="skip objects whose box covers less of the image, 0 to 1 (default: no limit)",
    )
    options.add_argument(
        "--max-area",
        type=share,
        default=1.0,
        metavar="SHARE",
        help="skip objects whose box covers more of the image, 0 to 1 (default: no limit)",
    )
    return options


def border_options() -> argparse.ArgumentParser:
    """Whether objects must be whole."""
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--skip-truncated",
        action="store_true",
        help="skip objects that the border of their image cuts: whose box touches it",
    )
    return options


def value_options() -> argparse.ArgumentParser:
    """What the values of mask pictures mean."""
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--mask-values",
        type=mask_values,
        nargs="+",
        metavar="VALUE",
        help="what a pixel of the object has where masks are not of 0 and 255, such as 1 or 1-20; "
        "a palette's values are its places; masks of 0 and 255 are drawn beside the manifest",
    )
    return options


def add_openimages(commands, parents: list[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "openimages", parents=parents, help="OpenImages V6: official CSV files and masks"
    )
    command.add_argument(
        "--classes", type=Path, required=True, help="class-descriptions-boxable.csv"
    )
    command.add_argument(
        "--annotations", type=Path, required=True, help="train-annotations-object-segmentation.csv"
    )
    command.add_argument(
        "--images", type=Path, nargs="+", required=True, help="folders with ImageID.jpg"
    )
    command.add_argument(
        "--masks",
        type=Path,
        nargs="+",
        required=True,
        help="folders with the mask PNGs, flat or in subfolders by first hex digit",
    )


def add_coco(commands, parents: list[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "coco", parents=parents, help="COCO instances; draws the masks beside the manifest"
    )
    command.add_argument("--instances", type=Path, required=True, help="instances_*.json")
    command.add_argument("--captions", type=Path, help="captions_*.json of the same images")
    command.add_argument("--images", type=Path, required=True, help="folder with the images")
    command.add_argument(
        "--keep-crowds", action="store_true", help="take what is marked as a crowd, too"
    )


def add_folder(commands, parents: list[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "folder", parents=parents, help="image, mask and label side by side in one folder"
    )
    command.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder with LABEL_image.png and LABEL_mask.png, "
        "or NAME.jpg, NAME_mask.png and NAME.txt",
    )


def add_official(commands, parents: list[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "official", parents=parents, help="list files of the official repository"
    )
    command.add_argument(
        "--list", type=Path, required=True, help="text file with one Python dict a line"
    )
    command.add_argument(
        "--images", type=Path, required=True, help="folder that the list's image paths start from"
    )
    command.add_argument(
        "--masks", type=Path, required=True, help="folder that the list's mask paths start from"
    )


def add_webdataset(commands, parents: list[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "webdataset",
        parents=parents,
        help="tar shards of KEY.jpg, KEY.mask.png, KEY.json or KEY.txt; they stay as they are",
    )
    command.add_argument(
        "--shard",
        nargs="+",
        required=True,
        metavar="TAR",
        help="tar files below the manifest's folder; or, with webdataset installed, URLs, pipe: "
        "commands and patterns such as {000000..000099}, which are copied beside the manifest",
    )


def add_testset(commands, parents: list[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "testset",
        parents=parents,
        help="choose samples of manifests at random, so that anyone gets the same ones",
    )
    command.add_argument(
        "--from",
        type=Path,
        nargs="+",
        required=True,
        metavar="MANIFEST",
        dest="manifests",
        help="manifests of this command's other sources, such as COCO's validation",
    )
    command.add_argument(
        "--count",
        type=_sample_count,
        required=True,
        metavar="N",
        help="samples; paper-openimages is 13400, paper-coco 9311",
    )
    command.add_argument("--seed", type=int, default=0, help="of the choice (default: 0)")
    command.add_argument(
        "--per-image",
        type=int,
        default=0,
        metavar="N",
        help="objects of one picture at most (default: no limit)",
    )
    command.add_argument(
        "--out", type=Path, required=True, metavar="MANIFEST", help="file to write (.jsonl)"
    )
    command.add_argument("--overwrite", action="store_true", help="replace a manifest that exists")
    launch.add_host_options(command, installs=False)


def _sample_count(text: str) -> int:
    if text in PAPER:
        return PAPER[text]
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"{text} is no number of samples, expected 1 or more, or {' or '.join(PAPER)}"
        )
    return int(text)


def share(text: str) -> float:
    """A number from 0 to 1."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share of the image, expected 0 to 1")
    return number


def shard_size(text: str) -> float:
    """Megabytes of a shard."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no size of a shard, expected MB above 0")
    return number


def mask_values(text: str) -> range:
    """A value of a mask, or a range of them such as 1-20."""
    first, dash, last = text.partition("-")
    last = last if dash else first
    if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) <= 65535):
        raise argparse.ArgumentTypeError(
            f"{text} is no value of a mask, expected a number from 0 to 65535 or a range such as "
            "1-20"
        )
    return range(int(first), int(last) + 1)


if __name__ == "__main__":
    launch.interruptible(main)
