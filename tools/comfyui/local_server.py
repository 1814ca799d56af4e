"""A ComfyUI server with this pack in it, on loopback, driven as a browser would.

Over HTTP and websocket. Runs in ComfyUI's Python (needs aiohttp, which ComfyUI brings).
"""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from comfyui import ROOT, launch

PACK_FOLDER = "cat-diffusion"
LONGEST_START = 180  # seconds
LONGEST_STOP = 10
TEXT_ON_NODE = 3  # kind of a binary message (protocol.py of the host)
ENDS = ("execution_error", "execution_interrupted", "execution_success")


class ServerError(RuntimeError):
    """The server did not start, refused a prompt or closed the connection; the message says why."""


@dataclass
class PromptResult:
    """What came of one prompt."""

    outputs: dict = field(default_factory=dict)  # node id -> its ui outputs
    seconds: dict[str, float] = field(default_factory=dict)  # node id -> time in it
    texts: dict[str, str] = field(default_factory=dict)  # node id -> sentence shown on it
    error: dict | None = None  # the execution_error message
    interrupted: bool = False


class _Listener:
    """Makes a PromptResult of a prompt's messages, in the order in which they come."""

    def __init__(self):
        self.result = PromptResult()
        self.ended = False
        self._node = None  # that is running
        self._since = 0.0

    def hear_bytes(self, message: bytes) -> None:
        """A binary message: of these only the text shown on a node counts."""
        kind = int.from_bytes(message[:4], "big")
        if kind != TEXT_ON_NODE:
            return
        end_of_name = 8 + int.from_bytes(message[4:8], "big")
        node = message[8:end_of_name].decode()
        self.result.texts[node] = message[end_of_name:].decode()

    def hear(self, kind: str, data: dict) -> None:
        """A message in JSON."""
        if kind in ENDS or kind == "executing":
            self._stop_clock()
        if kind == "executing":
            self._node = data.get("node")
            self._since = time.monotonic()
        elif kind == "executed" and data.get("output"):
            self.result.outputs[data["node"]] = data["output"]
        elif kind == "execution_error":
            self.result.error = data
        elif kind == "execution_interrupted":
            self.result.interrupted = True
        self.ended = kind in ENDS

    def _stop_clock(self) -> None:
        if self._node is not None:
            spent = time.monotonic() - self._since
            self.result.seconds[self._node] = self.result.seconds.get(self._node, 0) + spent
        self._node = None


def make_base(base: Path) -> None:
    """Lay out a user folder for ComfyUI with this pack as its only custom node."""
    for folder in ("custom_nodes", "input", "output", "user", "models/cat_diffusion"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    pack = base / "custom_nodes" / PACK_FOLDER
    if pack.is_symlink() or not pack.exists():
        pack.unlink(missing_ok=True)
        try:
            pack.symlink_to(ROOT, target_is_directory=True)
            return
        except OSError:
            pass  # Windows without the right to make links
    shutil.rmtree(pack, ignore_errors=True)
    shutil.copytree(ROOT, pack, ignore=shutil.ignore_patterns(".git", "__pycache__"))


class LocalServer:
    """`with LocalServer(base) as server: server.run(prompt)`; the process ends with the block.

    Args:
        base: folder made by `make_base`; models, input and output live there.
        arguments: more arguments for ComfyUI's main.py.
    """

    def __init__(self, base: Path, *arguments: str, comfyui: str | None = None):
        self.base = base
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = base / "server.log"
        root = Path(comfyui or os.environ[launch.COMFYUI])
        self.command = [sys.executable, str(root / "main.py")]
        self.command += ["--listen", "127.0.0.1", "--port", str(self.port)]
        self.command += ["--base-directory", str(base), "--disable-auto-launch"]
        self.command += ["--database-url", "sqlite:///:memory:", *arguments]

    def __enter__(self):
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.base,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        if self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGINT if os.name != "nt" else signal.SIGTERM)
        try:
            self.process.wait(LONGEST_STOP)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _wait(self) -> None:
        end = time.monotonic() + LONGEST_START
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise ServerError(f"ComfyUI ended while starting. Its log ends:\n{self.tail()}")
            try:
                self.get("/system_stats")
                return
            except (aiohttp.ClientError, OSError):
                time.sleep(0.2)
        raise ServerError(
            f"ComfyUI did not answer within {LONGEST_START} s. Its log ends:\n{self.tail()}"
        )

    def tail(self, lines: int = 30) -> str:
        """The end of the server's log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def get(self, path: str):
        """GET as JSON."""
        return asyncio.run(self._request("GET", path))

    def post(self, path: str, body: dict | None = None):
        """POST JSON, get JSON (None for an empty answer); a refused prompt raises ServerError."""
        return asyncio.run(self._request("POST", path, body or {}))

    async def _request(self, method, path, body=None):
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, self.url + path, json=body) as answer,
        ):
            content = await answer.read()
            if answer.status >= 400:
                raise ServerError(content.decode(errors="replace"))
            return json.loads(content) if content.strip() else None

    def run(
        self, prompt: dict, on_event: Callable[[str, dict], None] | None = None
    ) -> PromptResult:
        """Queue an API-format prompt and wait until it has ended, however it does.

        Args:
            on_event: called with every message of this prompt, (type, data).
        """
        return asyncio.run(self._run(prompt, on_event))

    async def _run(self, prompt, on_event) -> PromptResult:
        listener = _Listener()
        client = uuid.uuid4().hex  # of its own: the server tells each client of its prompts alone
        url = f"{self.url}/ws?clientId={client}"
        body = {"prompt": prompt, "client_id": client}
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(url, max_msg_size=0) as messages,
        ):
            queued = await self._request("POST", "/prompt", body)
            async for message in messages:
                if message.type == aiohttp.WSMsgType.BINARY:
                    listener.hear_bytes(message.data)
                    continue
                if message.type != aiohttp.WSMsgType.TEXT:
                    break
                event = json.loads(message.data)
                kind = event["type"]
                data = event["data"]
                # Messages without one are about the server, such as the length of its queue.
                if data.get("prompt_id") not in (None, queued["prompt_id"]):
                    continue  # of another prompt
                if on_event:
                    on_event(kind, data)
                listener.hear(kind, data)
                if listener.ended:
                    return listener.result
        raise ServerError(f"ComfyUI closed the connection. Its log ends:\n{self.tail()}")

    def image_path(self, image: dict) -> Path:
        """Where a picture of `PromptResult.outputs[...]["images"]` lies."""
        return self.base / image["type"] / image["subfolder"] / image["filename"]
