"""Write a training manifest from a data set; tools/prepare_data.py's work."""

import itertools
import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

from cat_diffusion.cat_core import files
from cat_diffusion.cat_core.data import manifest, masks, members
from cat_diffusion.cat_core.data.folder import Candidate, DataFolder, triples
from cat_diffusion.cat_core.data.manifest import Record
from cat_diffusion.cat_core.data.tally import Tally

from . import data_sources, tar_shards
from .mask_changes import MaskChanges

MB = 1e6
BORDER = 0.002  # of a side: an object whose box comes closer to the border is cut by it
AHEAD = 32  # samples that wait for each process


class Limits(NamedTuple):
    """What a sample must be like to be used."""

    least_area: float = 0.0  # of its box, as a share of the image
    most_area: float = 1.0
    skips_truncated: bool = False  # objects that the border of their picture cuts
    decodes: bool = False  # whether its pictures must decode, not only exist


def command(arguments) -> int:
    """Prepare what the arguments name; returns the exit code."""
    sys.stdout.reconfigure(errors="backslashreplace")  # ids may hold what a terminal cannot show
    warnings.simplefilter("ignore", SyntaxWarning)  # list files hold stray backslashes, many
    limits = Limits(
        getattr(arguments, "min_area", 0.0),
        getattr(arguments, "max_area", 1.0),
        getattr(arguments, "skip_truncated", False),
        arguments.check,
    )
    try:
        _check_targets(arguments)
        count = prepare(
            _with_changes(arguments),
            arguments.out,
            limits,
            workers=_workers(arguments),
            shards=arguments.shards and int(arguments.shards * MB),
        )
    except (manifest.ManifestError, data_sources.SourceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nstopped; {arguments.out} was not written", file=sys.stderr)
        return 1
    report = _report_path(arguments.out)
    if not count:
        print(
            f"error: no usable sample in {arguments.source}; {arguments.out} was not written, "
            f"{report} says why",
            file=sys.stderr,
        )
        return 1
    print(f"Wrote {arguments.out} and {report}.")
    return 0


def prepare(
    candidates: Iterable[Candidate],
    out: Path,
    limits: Limits,
    *,
    workers: int = 1,
    shards: int | None = None,
) -> int:
    """Write the manifest of what is usable, and a report of the rest beside it.

    Args:
        workers: processes that draw and decode.
        shards: bytes of a tar shard that files are copied into; None leaves them where they are.
    Returns:
        how many samples there are; without any the manifest is not written.
    """
    tally = Tally()
    records = usable(_shown(candidates, tally), tally, out.parent, limits, workers)
    if shards:
        records = tar_shards.packed(records, out.parent, out.stem, shards)
    first = next(records, None)
    if first is not None:
        manifest.write(out, itertools.chain([first], records))
    files.write_text(_report_path(out), f"{tally}\n")
    print(tally)
    for advice in _advice(tally):
        print(advice)
    return tally.kept


def _advice(tally: Tally) -> Iterator[str]:
    """Sentences on what the command can do about samples that it skipped."""
    if any(reason.endswith(masks.OTHER_VALUES) for reason in tally.skipped):
        yield "Say which values of a mask mean the object with --mask-values, such as 1 or 1-20."
    if tar_shards.CUT in tally.skipped:
        yield "A shard is cut short: fetch or copy it again; the samples before the cut are used."
    if masks.TURNED in tally.skipped:
        yield "--turn-masks turns masks that are drawn on images before their EXIF data turns them."


def usable(
    candidates: Iterable[Candidate],
    tally: Tally,
    folder: Path,
    limits: Limits,
    workers: int = 1,
) -> Iterator[Record]:
    """Yield the records that can be trained on; count and name the other samples in `tally`.

    Args:
        folder: the manifest's; masks that are drawn go below it.
        workers: processes that draw and decode; the order is that of the candidates in any case.
    """
    seen: set[str] = set()
    with ExitStack() as stack:
        examine = partial(examined, folder=folder, limits=limits)
        if workers > 1:
            pool = ProcessPoolExecutor(workers, initializer=_leave_ctrl_c)
            stack.callback(pool.shutdown, cancel_futures=True)
            results = _ahead(pool, examine, candidates, seen, ahead=AHEAD * workers)
        else:
            results = ((each, _at_once(examine, each, seen)) for each in candidates)
        for candidate, reason in results:
            record = candidate.record
            if reason is not None or record is None:
                tally.skip(reason or candidate.reason, candidate.id)
                continue
            seen.add(record.id)
            tally.keep()
            yield record


def examined(candidate: Candidate, folder: Path, limits: Limits) -> str | None:
    """Draw a sample's mask where it has none; why the sample cannot be used, or None."""
    record = candidate.record
    if record is None:
        return candidate.reason
    try:
        _check_box(record, limits)
        if not members.is_file(folder / record.image):
            raise masks.SampleError("missing image")
        if candidate.draw is not None:
            _save(candidate.draw(), folder / record.mask)
        elif record.mask is not None and not members.is_file(folder / record.mask):
            raise masks.SampleError("missing mask")
        if limits.decodes:
            _check_pictures(record, folder)
    except masks.SampleError as error:
        return error.reason
    return None


Examine = Callable[[Candidate], str | None]
Result = tuple[Candidate, str | None]  # a sample, and why it cannot be used


def _at_once(examine: Examine, candidate: Candidate, seen: Container[str]) -> str | None:
    if candidate.record is not None and candidate.record.id in seen:
        return "duplicate id"
    return examine(candidate)


def _ahead(
    pool: Executor,
    examine: Examine,
    candidates: Iterable[Candidate],
    seen: Container[str],
    ahead: int,
) -> Iterator[Result]:
    """What a pool finds of samples, in their order; no more than `ahead` of them wait."""
    waiting: deque[tuple[Candidate, Future]] = deque()
    ids: set[str] = set()  # of those that wait: whether the first of two counts is not known yet
    for candidate in candidates:
        record = candidate.record
        is_known = record is not None and record.id in ids
        while waiting and (is_known or len(waiting) >= ahead):
            yield _next(waiting, ids)
        if record is None or record.id in seen:
            future = Future()
            future.set_result(candidate.reason if record is None else "duplicate id")
        else:
            ids.add(record.id)
            future = pool.submit(examine, candidate)
        waiting.append((candidate, future))
    while waiting:
        yield _next(waiting, ids)


def _next(waiting: "deque[tuple[Candidate, Future]]", ids: set[str]) -> Result:
    candidate, future = waiting.popleft()
    if candidate.record is not None:
        ids.discard(candidate.record.id)
    return candidate, future.result()


def _leave_ctrl_c() -> None:
    """In a worker: Ctrl-C is the command's affair."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# The command line ---------------------------------------------------------------------------------


def _check_targets(arguments) -> None:
    """Raise ManifestError where the command would write over something unasked."""
    targets = [arguments.out, _report_path(arguments.out)]
    if arguments.source == "coco" or _changes(arguments):
        targets.append(_masks_path(arguments.out))
    if arguments.shards:
        targets += arguments.out.parent.glob(f"{arguments.out.stem}-??????.tar")
    for path in targets:
        if path.exists() and not arguments.overwrite:
            raise manifest.ManifestError(
                f"{path} exists already and was not touched. Give --overwrite to replace it."
            )


def _workers(arguments) -> int:
    """Processes: one where there is nothing to draw or decode."""
    is_work = arguments.source == "coco" or arguments.check or _changes(arguments)
    return arguments.workers or ((os.cpu_count() or 1) if is_work else 1)


def _changes(arguments) -> MaskChanges:
    given = getattr(arguments, "mask_values", None)
    values = frozenset().union(*given) if given else None
    return MaskChanges(values, arguments.turn_masks)


def _with_changes(arguments) -> Iterator[Candidate]:
    """The samples, their masks changed as the arguments say; raises SourceError."""
    changes = _changes(arguments)
    candidates = _candidates(arguments)
    if not changes:
        return candidates
    path = _masks_path(arguments.out)
    return changes.apply(candidates, arguments.out.parent, DataFolder(path, path.name))


def _candidates(arguments) -> Iterator[Candidate]:
    """The samples of the data set that the arguments name; raises SourceError."""
    for name in ("classes", "annotations", "instances", "captions", "list"):
        path = getattr(arguments, name, None)
        if path is not None and not path.is_file():
            raise data_sources.SourceError(
                f"--{name} {path} is not a file, expected one; see --help."
            )
    out = arguments.out
    split = arguments.split
    if arguments.source == "openimages":
        return data_sources.openimages(
            arguments.classes,
            arguments.annotations,
            [data_sources.locate(path, out) for path in arguments.images],
            [data_sources.locate(path, out) for path in arguments.masks],
            split,
        )
    if arguments.source == "coco":
        from . import coco  # needs numpy, the other sources do not

        drawn = _masks_path(out)
        return coco.coco(
            arguments.instances,
            arguments.captions,
            data_sources.locate(arguments.images, out),
            DataFolder(drawn, drawn.name),
            split,
            arguments.turn_masks,
            arguments.keep_crowds,
        )
    if arguments.source == "webdataset":
        return tar_shards.tar_shards(arguments.shard, DataFolder(out.parent, ""), split)
    if arguments.source == "folder":
        return triples(data_sources.locate(arguments.data, out), split)
    images = data_sources.locate(arguments.images, out)
    return data_sources.official(
        arguments.list, images, data_sources.locate(arguments.masks, out), split
    )


def _report_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.report.txt")


def _masks_path(out: Path) -> Path:
    """Where the masks go that are drawn."""
    return out.with_name(f"{out.stem}_masks")


# Samples ------------------------------------------------------------------------------------------


def _check_box(record: Record, limits: Limits) -> None:
    if record.box is None:
        return
    x0, y0, x1, y1 = record.box
    area = (x1 - x0) * (y1 - y0)
    if area < limits.least_area:
        raise masks.SampleError(f"smaller than {limits.least_area:g} of the image")
    if area > limits.most_area:
        raise masks.SampleError(f"larger than {limits.most_area:g} of the image")
    if limits.skips_truncated and (min(x0, y0) < BORDER or max(x1, y1) > 1 - BORDER):
        raise masks.SampleError("truncated by the border of the image")


def _check_pictures(record: Record, folder: Path) -> None:
    """Decode a record's pictures and let Pillow verify their checksums; raises SampleError."""
    masks.load(record, folder)
    for kind, name in (("image", record.image), ("mask", record.mask)):
        if name is None:
            continue
        try:
            with members.opened(folder / name) as content, Image.open(content) as file:
                file.verify()
        except Exception as error:  # whatever Pillow raises for what is broken
            raise masks.SampleError(f"corrupt {kind}", str(error)) from error


def _save(mask: Image.Image, path: Path) -> None:
    """Write a mask as a one-bit PNG."""
    with files.replacing(path) as partial:
        mask.convert("1").save(partial, format="PNG")


def _shown(candidates: Iterable[Candidate], tally: Tally) -> Iterator[Candidate]:
    """Pass everything on and say how far it is; in a log file every ten seconds."""
    pause = 0.2 if sys.stderr.isatty() else 10
    with tqdm(candidates, unit=" samples", mininterval=pause, leave=False) as bar:
        for candidate in bar:
            yield candidate
            skipped = sum(tally.skipped.values())
            bar.set_postfix(kept=tally.kept, skipped=skipped, refresh=False)
