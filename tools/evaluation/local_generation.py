"""Run a manifest's samples through a method in this process; tools/generate.py's work."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from time import perf_counter

import torch
from PIL import Image

from cat_diffusion.cat_core.data import manifest, tally
from cat_diffusion.cat_core.data.manifest import Record
from cat_diffusion.cat_core.data.masks import SampleError

from . import generation
from .blended_latent import BlendedLatentMethod
from .local_methods import DiffusersMethod, LocalMethod, PythonMethod, Request, as_picture
from .picture_bar import picture_bar
from .results_writer import GenerateError, MadePicture, ResultsWriter
from .sample_checks import check_id, sample_pictures, sample_seed

WORKERS = 2  # threads that decode photos while the method works


def command(arguments) -> int:
    """Generate what the arguments name; returns the exit code."""
    return generation.answer(generate, arguments)


def generate(arguments) -> int:
    """Make what is not there yet, and say what became of all samples; returns the exit code."""
    total = generation.count(arguments)
    method = build_method(arguments)
    facts = {**method.facts, "prompt": arguments.prompt, "background": arguments.background}
    results = ResultsWriter(arguments.out, arguments, facts, {"model": arguments.method})
    report = LocalGeneration(arguments, method, results).run(total)
    return generation.tell(report, results)


def build_method(arguments) -> LocalMethod:
    """The method that --method names; raises GenerateError."""
    kind, _, rest = arguments.method.partition(":")
    if kind == "python":
        file, _, function = rest.rpartition(":")
        return PythonMethod(Path(file), function)
    device = "cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu"
    settings = {
        "device": device,
        "dtype": arguments.dtype or ("float16" if device == "cuda" else "float32"),
        "steps": arguments.steps,
        "guidance": arguments.guidance,
    }
    if kind == "blended-latent":
        return BlendedLatentMethod(rest, decoder_steps=arguments.decoder_steps, **settings)
    return DiffusersMethod(rest, **settings)


class LocalGeneration:
    """Photos are decoded ahead by threads; the method gets a batch at a time."""

    def __init__(self, arguments, method: LocalMethod, results: ResultsWriter):
        self.arguments = arguments
        self.method = method
        self.results = results
        self.report = tally.Tally()

    def run(self, total: int) -> tally.Tally:
        """Work until all samples are done; raises GenerateError."""
        batch: list[tuple[Record, Request]] = []
        with picture_bar(total) as self.bar, ThreadPoolExecutor(WORKERS) as pool:
            for prepared in self._prepared(pool):
                batch.append(prepared)
                if len(batch) == self.arguments.batch_size:
                    self._make(batch)
                    batch = []
            if batch:
                self._make(batch)
        return self.report

    def _prepared(self, pool: ThreadPoolExecutor) -> Iterator[tuple[Record, Request]]:
        """The samples that are still to be made, in the manifest's order."""
        ahead: deque[tuple[Record, Future]] = deque()
        for record in manifest.stream(self.arguments.manifest, self.arguments.split):
            ahead.append((record, pool.submit(self._prepare, record)))
            if len(ahead) > self.arguments.batch_size + WORKERS:
                yield from self._settled(*ahead.popleft())
        while ahead:
            yield from self._settled(*ahead.popleft())

    def _prepare(self, record: Record) -> Request | None:
        """What the method gets, None where its picture is there; raises SampleError."""
        check_id(record.id)
        seed = sample_seed(self.arguments.seed, record.id)
        if self.results.finished(record, seed):
            return None
        self.results.discard(record)
        photo, hole = sample_pictures(
            record, self.arguments.manifest.parent, self.arguments.hole, self.arguments.size
        )
        label = record.label or record.caption
        return Request(photo, hole, self.arguments.prompt.replace("{label}", label), seed)

    def _settled(self, record: Record, future: Future) -> Iterator[tuple[Record, Request]]:
        try:
            request = future.result()
        except SampleError as error:
            self._give_up(record, error)
            return
        if request is not None:
            yield record, request
            return
        self.report.keep()
        # What was there says nothing about the time that is left.
        self.bar.initial += 1
        self.bar.update()

    def _make(self, batch: Sequence[tuple[Record, Request]]) -> None:
        """Let the method make a batch; where that fails, picture by picture."""
        began = perf_counter()
        made = self._called([request for _, request in batch])
        seconds = (perf_counter() - began) / len(batch)
        for (record, request), picture in zip(batch, made, strict=True):
            try:
                if isinstance(picture, SampleError):
                    raise picture
                picture = as_picture(picture, self.arguments.size, self.method.facts["method"])
            except SampleError as error:
                self._give_up(record, error)
                continue
            if self.arguments.background == "photo":
                picture = Image.composite(picture, request.photo, request.hole)
            made_here = MadePicture(picture, {"device": self.method.place}, seconds)
            self.results.write(record, request.seed, made_here)
            self.report.keep()
            self.bar.update()

    def _called(self, requests: Sequence[Request]) -> list:
        try:
            return self.method(requests)
        except torch.OutOfMemoryError as error:
            raise GenerateError(
                f"{self.method.facts['method']} ran out of memory with {len(requests)} pictures "
                "at once. Give a smaller --batch-size; what is finished stays."
            ) from error
        except Exception as error:  # whatever a pipeline raises
            if len(requests) > 1:
                made = []
                for request in requests:
                    made += self._called([request])
                return made
            reason = f"error in {self.method.facts['method']}"
            return [SampleError(reason, f"{type(error).__name__}: {error}")]

    def _give_up(self, record: Record, error: SampleError) -> None:
        """Count and name a sample that has no result."""
        self.report.skip(error.reason, record.id)
        self.results.name_failed(record.id, error)
        self.bar.update()
