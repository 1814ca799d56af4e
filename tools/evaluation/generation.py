"""Run a manifest's samples through ComfyUI servers with a workflow; tools/generate.py's work."""

import os
import sys
import threading
import time
from collections.abc import Callable

from cat_diffusion.cat_core.data import manifest, tally
from cat_diffusion.cat_core.data.manifest import Record
from cat_diffusion.cat_core.data.masks import SampleError
from cat_diffusion.cat_core.errors import CatError
from comfyui.remote_server import Gone, RemoteServer, Workflow

from .picture_bar import picture_bar
from .results_writer import GenerateError, MadePicture, ResultsWriter
from .sample_checks import (
    ServerWork,
    check_id,
    finished_picture,
    outcome,
    png,
    sample_pictures,
    sample_seed,
)
from .sample_queue import SampleQueue

IN_FLIGHT = 3  # prompts on each server, so that it never waits for the next
ATTEMPTS = 5  # times a sample may lose its server before it is given up
MOST_WAIT = 60  # seconds between two looks at a server that is gone


def command(arguments) -> int:
    """Generate what the arguments name; returns the exit code."""
    return answer(generate, arguments)


def answer(generate: Callable, arguments) -> int:
    """Call it and say what goes wrong; returns the exit code."""
    sys.stdout.reconfigure(errors="backslashreplace")  # ids may hold what a terminal cannot show
    try:
        return generate(arguments)
    except CatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def generate(arguments) -> int:
    """Make what is not there yet, and say what became of all samples; returns the exit code."""
    workflow = Workflow(arguments.workflow, arguments.changes)
    if arguments.posterior == "sample":
        workflow.sample_posterior()
    total = count(arguments)
    method = {"workflow": workflow.name, "workflow_sha256": workflow.sha256}
    more = {"changes": arguments.changes, "posterior": arguments.posterior}
    results = ResultsWriter(arguments.out, arguments, method, more)
    servers = [RemoteServer(url) for url in dict.fromkeys(arguments.server)]
    generation = Generation(arguments, workflow, results, servers)
    report = generation.run(total)
    for url, work in generation.work.items():
        if work.pictures:
            print(f"{url}: {work}")
    return tell(report, results)


def count(arguments) -> int:
    """How many records there are to make; raises GenerateError where there is none."""
    total = sum(1 for _ in manifest.stream(arguments.manifest, arguments.split))
    if not total:
        raise GenerateError(
            f"{arguments.manifest} has no record of split {arguments.split}; choose another with "
            "--split."
        )
    return total


def tell(report: tally.Tally, results: ResultsWriter) -> int:
    """Say what became of the samples; returns the exit code."""
    print(report)
    if report.skipped:
        print(f"Results: {results.folder}, samples without one: {results.failed}")
    else:
        print(f"Results: {results.folder}")
    return 0 if report.kept else 1


class Generation:
    """Threads, IN_FLIGHT for each server, that take samples from one queue until there are none."""

    def __init__(
        self, arguments, workflow: Workflow, results: ResultsWriter, servers: list[RemoteServer]
    ):
        self.arguments = arguments
        self.workflow = workflow
        self.results = results
        self.servers = servers
        self.queue = SampleQueue(manifest.stream(arguments.manifest, arguments.split))
        self.telling = threading.Lock()  # guards all that follow
        self.report = tally.Tally()
        self.bar = None
        self.work = {server.url: ServerWork() for server in servers}
        self.down: set[str] = set()  # addresses of servers that do not answer

    def run(self, total: int) -> tally.Tally:
        """Work until all samples are done; raises what stopped the run before."""
        session = os.urandom(4).hex()  # servers may share their folders, and so may runs
        threads = []
        for number, server in enumerate(self.servers * IN_FLIGHT):
            slot = f"{session}_{number}"
            threads.append(threading.Thread(target=self._work, args=(server, slot), daemon=True))
        with picture_bar(total) as self.bar:
            for thread in threads:
                thread.start()
            while not self.queue.over.wait(0.5):
                if sys.stderr.isatty():
                    self.bar.refresh()
            for thread in threads:
                thread.join(1)  # one that still waits for a server has nothing to lose
        if self.queue.error:
            raise self.queue.error
        return self.report

    def _work(self, server: RemoteServer, slot: str) -> None:
        """What each thread does; `slot` begins the names of the files that it uploads."""
        try:
            while (taken := self.queue.take()) is not None:
                record, losses = taken
                try:
                    # A new name in every attempt, so that nothing comes from a server's cache.
                    self._sample(server, f"{slot}_{losses}", record)
                except Gone as gone:
                    self._give_back(server, record, losses + 1, gone)
                    self._await(server)
        except Exception as error:
            self.queue.stop(error)

    def _sample(self, server: RemoteServer, slot: str, record: Record) -> None:
        """Make one sample, unless its result is there; raises Gone."""
        try:
            check_id(record.id)
            seed = sample_seed(self.arguments.seed, record.id)
            is_there = self.results.finished(record, seed)
            if not is_there:
                self.results.discard(record)
                made = self._make(server, slot, record, seed)
                if made is None:
                    return
                self.results.write(record, seed, made)
        except SampleError as error:
            self._give_up(record, error)
            return
        with self.telling:
            self.report.keep()
            # What was there says nothing about the time that is left.
            self.bar.initial += is_there
            self.bar.update()
        self.queue.done()

    def _make(
        self, server: RemoteServer, slot: str, record: Record, seed: int
    ) -> MadePicture | None:
        """One sample's picture, or None where the run has ended meanwhile."""
        size = self.arguments.size
        folder = self.arguments.manifest.parent
        photo, hole = sample_pictures(record, folder, self.arguments.hole, size)
        prompt = self.workflow.prompt(
            photo=server.upload(f"{slot}_photo.png", png(photo)),
            # In colour: ComfyUI reads the white of a grey PNG one level too dark.
            mask=server.upload(f"{slot}_mask.png", png(hole.convert("RGB"))),
            label=record.label or record.caption,
            seed=seed,
        )
        ended = server.wait(server.queue(prompt), self.queue.over)
        if ended is None:
            return None
        image, span = outcome(ended, self.workflow.output)
        with self.telling:
            self.work[server.url].add(span)
        return MadePicture(
            finished_picture(server, image, size), {"server": server.url}, span.seconds
        )

    def _give_up(self, record: Record, error: SampleError) -> None:
        """Count and name a sample that has no result."""
        with self.telling:
            self.report.skip(error.reason, record.id)
            self.results.name_failed(record.id, error)
            self.bar.update()
        self.queue.done()

    def _give_back(self, server: RemoteServer, record: Record, losses: int, gone: Gone) -> None:
        """Leave a sample to whoever answers, unless it has lost its server too often."""
        with self.telling:
            if server.url not in self.down:
                self.down.add(server.url)
                self.bar.write(f"{server.url}: {gone}. Trying again.", file=sys.stderr)
        if losses < ATTEMPTS:
            self.queue.give_back(record, losses)
        else:
            detail = f"{losses} times, the last one {server.url}: {gone}"
            self._give_up(record, SampleError("server lost", detail))

    def _await(self, server: RemoteServer) -> None:
        """Wait, longer and longer, until the server answers.

        Stops the run if none has for too long.
        """
        patience = self.arguments.patience
        began = time.monotonic()
        wait = 1
        while not self.queue.over.wait(wait):
            if server.alive():
                self._tell_alive(server)
                return
            answered = max(other.answered for other in self.servers)
            silent = time.monotonic() - max(began, answered)
            if silent > patience:
                urls = ", ".join(other.url for other in self.servers)
                self.queue.stop(
                    GenerateError(
                        f"No server has answered for {silent:.0f} s: {urls}. What is finished is "
                        f"in {self.results.folder}; run the same command again to go on."
                    )
                )
            wait = min(2 * wait, MOST_WAIT, max(patience - silent, 1))

    def _tell_alive(self, server: RemoteServer) -> None:
        with self.telling:
            if server.url in self.down:
                self.down.remove(server.url)
                self.bar.write(f"{server.url} answers.", file=sys.stderr)
