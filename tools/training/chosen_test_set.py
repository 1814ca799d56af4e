"""A test set that anyone can make again; the work of tools/prepare_data.py testset."""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from cat_diffusion.cat_core import files
from cat_diffusion.cat_core.data import manifest, masks, members
from cat_diffusion.cat_core.data.chosen import FORMAT, record_path
from cat_diffusion.cat_core.data.manifest import Record
from cat_diffusion.cat_core.data.tally import Tally
from cat_diffusion.cat_core.errors import CatError

from . import data_sources


class ChoiceError(CatError):
    """A test set that cannot be chosen."""


def command(arguments) -> int:
    """Choose what the arguments ask for; returns the exit code."""
    sys.stdout.reconfigure(errors="backslashreplace")  # ids may hold what a terminal cannot show
    try:
        choose(arguments)
    except (CatError, data_sources.SourceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def choose(arguments) -> None:
    """Write the manifest, and beside it how it was chosen, with a hash of its content."""
    out = arguments.out
    for path in (out, record_path(out)):
        if path.exists() and not arguments.overwrite:
            raise ChoiceError(
                f"{path} exists already and was not touched. Give --overwrite to replace it."
            )
    candidates = list(_candidates(arguments))
    # The order follows from seed and id alone, so it is the same whatever the files' order is.
    candidates.sort(key=lambda record: _rank(arguments.seed, record.id))
    tally = Tally()
    chosen, digests = _usable(candidates, arguments, tally)
    print(tally)
    if len(chosen) < arguments.count:
        raise ChoiceError(
            f"{len(chosen)} samples are usable by these rules, --count is {arguments.count}; "
            f"{out} was not written. Give a smaller --count, wider areas or more manifests."
        )
    manifest.write(out, sorted(chosen, key=lambda record: record.id))
    about = {
        "format": FORMAT,
        "sha256": hashlib.sha256("".join(sorted(digests)).encode()).hexdigest(),
        "manifest_sha256": hashlib.sha256(out.read_bytes()).hexdigest(),
        "count": len(chosen),
        "seed": arguments.seed,
        "rules": {
            "min_area": arguments.min_area,
            "max_area": arguments.max_area,
            "per_image": arguments.per_image,
            "holes": list(masks.VARIANTS),
        },
        "from": [path.name for path in arguments.manifests],
        "skipped": dict(tally.skipped),
    }
    files.write_text(record_path(out), json.dumps(about, indent=1) + "\n")
    print(f"Wrote {out}: {len(chosen):,} samples, {about['sha256']}")


def _candidates(arguments) -> Iterator[Record]:
    """The samples with an object of all manifests, their paths as the new manifest sees them."""
    for path in arguments.manifests:
        folder = data_sources.locate(path.parent, arguments.out)
        for record in manifest.stream(path):
            if record.hole:
                mask = folder.inside(record.mask) if record.mask else None
                image = folder.inside(record.image)
                yield replace(record, image=image, mask=mask, split="test")


def _rank(seed: int, id: str) -> bytes:
    return hashlib.sha256(f"{seed}:{id}".encode()).digest()


def _usable(candidates: list[Record], arguments, tally: Tally) -> tuple[list[Record], list[str]]:
    """The first --count samples that keep the rules, and a hash of each."""
    chosen = []
    digests = []
    per_image = Counter()
    folder = arguments.out.parent
    with tqdm(total=arguments.count, unit=" samples", leave=False) as bar:
        for record in candidates:
            if len(chosen) == arguments.count:
                break
            try:
                if arguments.per_image and per_image[record.image] == arguments.per_image:
                    raise masks.SampleError("another object of a picture that is in it")
                _check(record, folder, arguments)
            except masks.SampleError as error:
                tally.skip(error.reason, record.id)
                continue
            per_image[record.image] += 1
            chosen.append(record)
            digests.append(_digest(record, folder))
            tally.keep()
            bar.update()
    return chosen, digests


def _check(record: Record, folder: Path, arguments) -> None:
    """Raise SampleError unless the object keeps the areas and both kinds of hole can be cut."""
    _, mask = masks.load(record, folder)
    assert mask is not None  # the record has a hole
    holes = {kind: masks.training_mask(mask, kind) for kind in masks.VARIANTS}
    share = holes["box"].histogram()[255] / masks.HOLE_SIZE**2
    if share < arguments.min_area:
        raise masks.SampleError(f"box smaller than {arguments.min_area:g} of the image")
    if share > arguments.max_area:
        raise masks.SampleError(f"box larger than {arguments.max_area:g} of the image")


def _digest(record: Record, folder: Path) -> str:
    """Of all that makes the sample, wherever its files lie."""
    digest = hashlib.sha256(json.dumps([record.id, record.label, record.box]).encode())
    for name in (record.image, record.mask):
        if name is not None:
            with members.opened(folder / name) as file:
                digest.update(hashlib.sha256(file.read()).digest())
    return digest.hexdigest()
