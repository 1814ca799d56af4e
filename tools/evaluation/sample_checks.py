"""What one sample sends to a server and what comes back, checked."""

import hashlib
import io
import math
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from cat_diffusion.cat_core.data import masks
from cat_diffusion.cat_core.data.manifest import Record
from cat_diffusion.cat_core.data.masks import SampleError
from cat_diffusion.cat_core.pictures import opening
from comfyui.remote_server import Gone, Refused, RemoteServer

ID_LENGTH = 200  # bytes; file systems end at 255
FORBIDDEN = set('/\\:*?"<>|')  # in file names, on one system or another


def sample_seed(seed: int, id: str) -> int:
    """The seed of one sample, below 2**48 so that the browser shows it in full."""
    digest = hashlib.sha256(f"{seed}:{id}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def check_id(id: str) -> None:
    """Raise SampleError for an id that is no file's name on every system.

    Neither may it be that of the run's own file.
    """
    fine = (
        id.isprintable()
        and FORBIDDEN.isdisjoint(id)
        and not id.startswith(".")
        and not id.endswith((" ", "."))
    )
    if not fine or id.lower() == "run" or len(id.encode()) > ID_LENGTH:
        raise SampleError("unusable id", f"{ascii(id)[:80]} cannot be a file's name")


def sample_pictures(
    record: Record, folder: Path, hole: str, size: int
) -> tuple[Image.Image, Image.Image]:
    """Photo (RGB) and hole (L, white = repaint), `size` x `size`, made as in training.

    Raises SampleError where there is none.
    """
    if not record.hole:
        raise SampleError("no hole", "the record has neither mask nor box")
    photo, mask = masks.load(record, folder)
    hole_512 = masks.cut_hole(record, mask, hole)
    return (
        photo.resize((size, size), Image.Resampling.BICUBIC),
        hole_512.resize((size, size), Image.Resampling.BICUBIC),
    )


@dataclass(frozen=True)
class Span:
    """When a server worked on a prompt, in seconds of its own clock."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start


@dataclass
class ServerWork:
    """What a server has done in a run, and how much of the time it waited for a prompt."""

    pictures: int = 0
    busy: float = 0.0  # seconds
    first: float = math.inf
    last: float = -math.inf

    def add(self, span: Span) -> None:
        """One more picture; prompts run one after another."""
        self.pictures += 1
        self.busy += span.seconds
        self.first = min(self.first, span.start)
        self.last = max(self.last, span.end)

    @property
    def idle(self) -> float:
        """Share of the time between its first and its last picture, 0 to 1."""
        whole = self.last - self.first
        return 1 - self.busy / whole if whole > 0 else 0.0

    def __str__(self) -> str:
        pace = self.busy / self.pictures
        return f"{self.pictures:,} pictures, {pace:.2f} s each, idle {100 * self.idle:.1f} %"


def outcome(ended: dict, output: str) -> tuple[dict, Span]:
    """The image that a prompt's history names, and when it was made.

    Args:
        ended: the history of one prompt.
        output: number of the node whose picture is wanted.
    Raises:
        SampleError: the prompt failed.
        Gone: somebody cancelled it.
    """
    messages = dict(ended["status"]["messages"])
    if "execution_interrupted" in messages:
        raise Gone("a prompt was cancelled there")
    if "execution_error" in messages:
        error = messages["execution_error"]
        raise SampleError(f"error in {error['node_type']}", error["exception_message"].strip())
    images = ended["outputs"].get(output, {}).get("images", [])
    if len(images) != 1:
        raise SampleError(
            "no single picture", f"the workflow made {len(images)} pictures, expected one"
        )
    start = messages["execution_start"]["timestamp"]
    end = messages["execution_success"]["timestamp"]
    return images[0], Span(start / 1000, end / 1000)


def finished_picture(server: RemoteServer, image: dict, size: int) -> Image.Image:
    """Fetch what a prompt made, as RGB; raises SampleError if it cannot be used."""
    try:
        content = server.view(image)
    except Refused as error:
        # A server that starts clears the temporary pictures of all servers in its folder.
        raise Gone("a picture that it made is gone") from error
    try:
        picture = opening.as_rgb(Image.open(io.BytesIO(content)))
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


def png(picture: Image.Image) -> bytes:
    """A picture as a file that is quick to write."""
    content = io.BytesIO()
    picture.save(content, "PNG", compress_level=1)
    return content.getvalue()
