"""Run a manifest's samples through ComfyUI servers, with a workflow in API format; tools/generate.py's work."""

import hashlib
import io
import json
import os
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from cat_diffusion.cat_core.data import manifest, masks, tally
from cat_diffusion.cat_core.data.masks import SampleError
from comfyui import remote_server

IN_FLIGHT = 2  # prompts on each server, so that it never waits for the next
ATTEMPTS = 5  # times a sample may lose its server before it is given up
MOST_WAIT = 60  # seconds between two looks at a server that is gone
ID_LENGTH = 200  # bytes; file systems end at 255


class GenerateError(RuntimeError):
    """The run cannot go on; what is finished stays, and the message says what to do."""


def command(arguments) -> int:
    """Generate what the arguments name; returns the exit code."""
    sys.stdout.reconfigure(errors="backslashreplace")  # ids may hold what a terminal cannot show
    try:
        return generate(arguments)
    except (
        GenerateError,
        remote_server.WorkflowError,
        remote_server.Refused,
        manifest.ManifestError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def generate(arguments) -> int:
    """Make what is not there yet, and say what became of all samples."""
    workflow = remote_server.Workflow(arguments.workflow, arguments.changes)
    total = sum(1 for _ in manifest.stream(arguments.manifest, arguments.split))
    if not total:
        raise GenerateError(
            f"{arguments.manifest} has no record of split {arguments.split}; choose another with --split."
        )
    results = Results(arguments.out, workflow, arguments)
    servers = [remote_server.RemoteServer(url) for url in dict.fromkeys(arguments.server)]
    run = Run(arguments, workflow, results, servers, total)
    run.go()
    print(run.report)
    print(
        f"Results: {arguments.out}"
        + (f", samples without one: {results.failed}" if run.report.skipped else "")
    )
    return 0 if run.report.kept else 1


def sample_seed(seed: int, id: str) -> int:
    """The seed of one sample, below 2**48 so that the browser shows it in full."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{id}".encode()).digest()[:6], "big")


def check_id(id: str) -> None:
    """Raise SampleError for an id that is no file's name on every system, or is that of the run's own file."""
    fine = (
        id.isprintable()
        and not set(id) & set('/\\:*?"<>|')
        and not id.startswith(".")
        and not id.endswith((" ", "."))
    )
    if not fine or id.lower() == "run" or len(id.encode()) > ID_LENGTH:
        raise SampleError("unusable id", f"{ascii(id)[:80]} cannot be a file's name")


class Results:
    """The folder of a run: for every sample ID.png and then ID.json, whole or not at all."""

    def __init__(self, folder: Path, workflow: remote_server.Workflow, arguments):
        self.folder, self.size = folder, arguments.size
        self.failed = folder / "failed.jsonl"
        self.common = {
            "hole": arguments.hole,
            "size": arguments.size,
            "workflow": workflow.name,
            "workflow_sha256": workflow.sha256,
        }
        run = {
            "manifest": str(arguments.manifest.absolute()),
            "split": arguments.split,
            "seed": arguments.seed,
            **self.common,
            "changes": arguments.changes,
        }
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            found = _object(folder / "run.json")
            for key in ("split", "seed", *self.common):
                if found and found.get(key) != run[key]:
                    raise GenerateError(
                        f"{folder} holds a run with {key} {found.get(key)}, not {run[key]}. Choose another "
                        "--out, or delete that folder."
                    )
            self._write("run.json", json.dumps(run, indent=1).encode())
            self.failed.write_text("")

    def facts(self, record, seed: int) -> dict:
        """What must be the same for a result to count as finished."""
        return {
            "id": record.id,
            "label": record.label or record.caption,
            "seed": seed,
            **self.common,
        }

    def finished(self, record, seed: int) -> bool:
        """Whether the sample's files are there, whole, and made like this."""
        found = _object(self.folder / f"{record.id}.json") or {}
        if any(found.get(key) != value for key, value in self.facts(record, seed).items()):
            return False
        try:
            with Image.open(self.folder / f"{record.id}.png") as picture:
                picture.verify()
            with Image.open(self.folder / f"{record.id}.png") as picture:
                picture.load()
                return picture.size == (self.size, self.size)
        except (
            Exception
        ):  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ... for what is broken
            return False

    def discard(self, record) -> None:
        """Take away what is there of a sample that is not finished: it may fail now, and must not be measured then."""
        with self._writing():
            for suffix in (".json", ".png"):
                (self.folder / f"{record.id}{suffix}").unlink(missing_ok=True)

    def write(self, record, seed: int, picture, server: str, seconds: float) -> None:
        """Keep a finished picture."""
        png = io.BytesIO()
        picture.save(png, "PNG")
        about = {**self.facts(record, seed), "server": server, "seconds": seconds}
        with self._writing():
            self._write(f"{record.id}.png", png.getvalue())
            self._write(f"{record.id}.json", json.dumps(about, indent=1).encode())

    def name_failed(self, id: str, error) -> None:
        """Put a sample that has no result, and why, on the list."""
        with self._writing(), open(self.failed, "a", encoding="ascii") as file:
            file.write(
                json.dumps({"id": id, "reason": error.reason, "detail": error.detail}) + "\n"
            )

    @contextmanager
    def _writing(self):
        try:
            yield
        except OSError as error:
            raise GenerateError(
                f"Cannot write to {self.folder}: {error}. Check free space and permissions, then run the same "
                "command again."
            ) from error

    def _write(self, name: str, content: bytes) -> None:
        partial = self.folder / f"{name}.partial"
        partial.write_bytes(content)
        os.replace(partial, self.folder / name)


def _object(path: Path) -> dict | None:
    """The JSON object in a file, or None."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


class Run:
    """Threads, IN_FLIGHT for each server, that take samples from one queue until there are no more."""

    def __init__(
        self,
        arguments,
        workflow: remote_server.Workflow,
        results: Results,
        servers: list[remote_server.RemoteServer],
        total: int,
    ):
        self.arguments, self.workflow, self.results, self.servers = (
            arguments,
            workflow,
            results,
            servers,
        )
        self.records = manifest.stream(arguments.manifest, arguments.split)
        self.report = tally.Tally()
        self.returned: list = []  # (record, times it lost its server)
        self.working = 0  # samples taken and neither finished nor returned
        self.down: set[str] = set()
        self.changed = threading.Condition()  # guards all of the above
        self.over = threading.Event()
        self.error: Exception | None = None
        self.session = os.urandom(4).hex()  # keeps apart the files of runs on one server
        self.bar = tqdm(
            total=total,
            unit=" pictures",
            smoothing=0,
            mininterval=0.2 if sys.stderr.isatty() else 30,
        )

    def go(self) -> None:
        """Work until all samples are done; raises what stopped the run before."""
        threads = [
            threading.Thread(
                target=self._work, args=(server, f"{self.session}_{number}"), daemon=True
            )
            for number, server in enumerate(self.servers * IN_FLIGHT)
        ]  # servers may share their folders
        for thread in threads:
            thread.start()
        while not self.over.wait(0.5):
            if sys.stderr.isatty():
                self.bar.refresh()
        for thread in threads:
            thread.join(1)  # one that still waits for a server has nothing to lose
        self.bar.close()
        if self.error:
            raise self.error

    def _work(self, server: remote_server.RemoteServer, slot: str) -> None:
        try:
            while (taken := self._take()) is not None:
                record, losses = taken
                try:
                    self._sample(
                        server, f"{slot}_{losses}", record
                    )  # a new name: not from the server's cache
                except remote_server.Gone as gone:
                    self._give_back(server, record, losses + 1, gone)
                    self._await(server)
        except Exception as error:
            self._stop(error)

    def _take(self):
        """The next (record, losses); None when there is nothing left to do."""
        with self.changed:
            while not self.over.is_set():
                if self.returned:
                    self.working += 1
                    return self.returned.pop()
                record = next(self.records, None)
                if record is not None:
                    self.working += 1
                    return record, 0
                if not self.working:
                    self.over.set()
                    self.changed.notify_all()
                self.changed.wait(1)
        return None

    def _sample(self, server: remote_server.RemoteServer, slot: str, record) -> None:
        try:
            check_id(record.id)
            seed = sample_seed(self.arguments.seed, record.id)
            there = self.results.finished(record, seed)
            if not there:
                self.results.discard(record)
                made = self._make(server, slot, record, seed)
                if made is None:
                    return
                self.results.write(record, seed, *made)
        except SampleError as error:
            with self.changed:
                self.report.skip(error.reason, record.id)
                self.results.name_failed(record.id, error)
                self._done()
        else:
            with self.changed:
                self.report.keep()
                self.bar.initial += there  # what was there says nothing about the time that is left
                self._done()

    def _done(self) -> None:
        self.working -= 1
        self.bar.update()
        self.changed.notify_all()

    def _make(self, server: remote_server.RemoteServer, slot: str, record, seed: int):
        """(picture, server, seconds) of one sample, or None where the run has ended meanwhile."""
        photo, hole = sample_pictures(
            record, self.arguments.manifest.parent, self.arguments.hole, self.arguments.size
        )
        names = [
            server.upload(f"{slot}_{kind}.png", _png(picture))
            for kind, picture in (("photo", photo), ("mask", hole))
        ]
        prompt = self.workflow.prompt(
            photo=names[0], mask=names[1], label=record.label or record.caption, seed=seed
        )
        ended = server.wait(server.queue(prompt), self.over)
        if ended is None:
            return None
        image, seconds = outcome(ended, self.workflow.output)
        return finished_picture(server, image, self.arguments.size), server.url, seconds

    def _give_back(
        self, server: remote_server.RemoteServer, record, losses: int, gone: remote_server.Gone
    ) -> None:
        with self.changed:
            if server.url not in self.down:
                self.down.add(server.url)
                self.bar.write(f"{server.url}: {gone}. Trying again.", file=sys.stderr)
            if losses < ATTEMPTS:
                self.working -= 1
                self.returned.append((record, losses))
                self.changed.notify_all()
                return
            error = SampleError("server lost", f"{losses} times, the last one {server.url}: {gone}")
            self.report.skip(error.reason, record.id)
            self.results.name_failed(record.id, error)
            self._done()

    def _await(self, server: remote_server.RemoteServer) -> None:
        """Wait, longer and longer, until the server answers; stop the run if none has for too long."""
        began, wait = time.monotonic(), 1
        while not self.over.wait(wait):
            if server.alive():
                with self.changed:
                    if server.url in self.down:
                        self.down.remove(server.url)
                        self.bar.write(f"{server.url} answers.", file=sys.stderr)
                return
            silent = time.monotonic() - max(began, *(server.answered for server in self.servers))
            if silent > self.arguments.patience:
                urls = ", ".join(server.url for server in self.servers)
                self._stop(
                    GenerateError(
                        f"No server has answered for {silent:.0f} s: {urls}. What is finished is in "
                        f"{self.results.folder}; run the same command again to go on."
                    )
                )
            wait = min(2 * wait, MOST_WAIT, max(self.arguments.patience - silent, 1))

    def _stop(self, error: Exception) -> None:
        with self.changed:
            self.error = self.error or error
            self.over.set()
            self.changed.notify_all()


def sample_pictures(record, folder: Path, hole: str, size: int):
    """Photo (RGB) and hole (L, white = repaint), `size` x `size`, made as in training; raises SampleError."""
    if not record.hole:
        raise SampleError("no hole", "the record has neither mask nor box")
    photo, mask = masks.load(record, folder)
    pictures = photo, masks.training_mask(mask, hole)
    return tuple(picture.resize((size, size), Image.Resampling.BICUBIC) for picture in pictures)


def outcome(ended: dict, output: str) -> tuple[dict, float]:
    """The image that a prompt's history names, and the seconds it took; raises SampleError where the prompt failed."""
    messages = dict(ended["status"]["messages"])
    if "execution_interrupted" in messages:
        raise remote_server.Gone("a prompt was cancelled there")
    if "execution_error" in messages:
        error = messages["execution_error"]
        raise SampleError(f"error in {error['node_type']}", error["exception_message"].strip())
    images = ended["outputs"].get(output, {}).get("images", [])
    if len(images) != 1:
        raise SampleError(
            "no single picture", f"the workflow made {len(images)} pictures, expected one"
        )
    return images[0], (
        messages["execution_success"]["timestamp"] - messages["execution_start"]["timestamp"]
    ) / 1000


def finished_picture(server: remote_server.RemoteServer, image: dict, size: int):
    """Fetch what a prompt made, as RGB; raises SampleError if it cannot be used."""
    try:
        content = server.view(image)
    except (
        remote_server.Refused
    ) as error:  # a server that starts clears the temporary pictures of all in its folder
        raise remote_server.Gone("a picture that it made is gone") from error
    try:
        picture = Image.open(io.BytesIO(content)).convert("RGB")
    except Exception as error:  # whatever Pillow raises for what is broken
        raise SampleError(
            "corrupt picture", f"{server.url} sent a picture that cannot be decoded ({error})"
        ) from error
    if picture.size != (size, size):
        raise SampleError(
            "wrong size",
            f"the workflow made {picture.width}x{picture.height} pixels, expected {size}x{size}",
        )
    return picture


def _png(picture) -> bytes:
    content = io.BytesIO()
    picture.save(content, "PNG", compress_level=1)
    return content.getvalue()
