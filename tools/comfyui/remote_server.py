"""API-format workflows and the servers that run them, over plain HTTP.

The servers may be on other machines. Needs nothing but the standard library.
"""

import copy
import hashlib
import http.client
import json
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path

from cat_diffusion.cat_core.errors import CatError

OUTPUTS = ("SaveImage", "PreviewImage")
TEXTS = ("value", "text", "string")  # what a node calls its text
SEEDS = ("seed", "noise_seed")
CONDITIONING = "CATInpaintConditioning"
TIMEOUT = 60  # seconds without an answer; a server that loads a model is slow to answer
FIRST_PAUSE = 0.1  # seconds between two looks at a prompt, at first
MOST_PAUSE = 2.0  # and at most
GATEWAY_ERRORS = (502, 503, 504)  # something before the server answers in its place


class WorkflowError(CatError):
    """A workflow that cannot be used."""


class Refused(CatError):
    """A server answered that it will not do this; asking again would not help."""


class Gone(Exception):
    """A server does not answer, or no longer knows the prompt; another may, or this one later."""


class Workflow:
    """A workflow in API format whose photo, mask, label and seed change from sample to sample.

    Nodes are found by their titles: Photo (LoadImage), Mask (LoadImageMask) and Label (any node
    with a text); seeds are all inputs called seed or noise_seed, and the picture comes from the
    only SaveImage or PreviewImage.

    Args:
        path: the file.
        changes: "TITLE.input=value" each, for what stays the same in all samples, such as a
            checkpoint's name.
    Raises:
        WorkflowError: no such file, another format, a node that is missing or there twice, a
            change that fits no node.
    """

    def __init__(self, path: Path, changes: list[str] = ()):
        self.name = path.name
        self.nodes = _read(path)
        for change in changes:
            self._change(change)
        self.sha256 = self._digest()
        photos = self._titled("Photo", "LoadImage")
        masks = self._titled("Mask", "LoadImageMask")
        self._places = {
            "photo": [(number, "image") for number in photos],
            "mask": [(number, "image") for number in masks],
            "label": self._texts(),
            "seed": self._seeds(),
        }
        self.output = self._output()
        for number in masks:
            self.nodes[number]["inputs"]["channel"] = "red"  # the hole is sent as a grey picture

    def sample_posterior(self) -> None:
        """Let all nodes of CAT Inpaint Conditioning sample the VAE's posterior, by the seed.

        Raises WorkflowError where there is none.
        """
        numbers = []
        for number, node in self.nodes.items():
            if node["class_type"] == CONDITIONING:
                node["inputs"]["posterior"] = "sample"
                numbers.append(number)
        if not numbers:
            raise WorkflowError(
                f"{self.name} has no node of {CONDITIONING}, and no other samples the VAE's "
                "posterior; leave --posterior out."
            )
        self._places["seed"] += [(number, "posterior_seed") for number in numbers]
        self.sha256 = self._digest()

    def _digest(self) -> str:
        """SHA-256 of the nodes, changes included."""
        canonical = json.dumps(self.nodes, sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def prompt(self, **values) -> dict:
        """The workflow for one sample.

        Args:
            values: of photo and mask (names on the server), label and seed.
        """
        nodes = copy.deepcopy(self.nodes)
        for place, value in values.items():
            for number, name in self._places[place]:
                nodes[number]["inputs"][name] = value
        return nodes

    def _titled(self, title: str, kind: str | None = None) -> list[str]:
        """Numbers of the nodes with a title, all of that kind."""
        titled = [number for number, node in self.nodes.items() if _title(node) == title]
        kinds = sorted({self.nodes[number]["class_type"] for number in titled})
        if not titled or (kind and kinds != [kind]):
            raise WorkflowError(
                f'{self.name}: nodes titled "{title}": {", ".join(kinds) or "none"}; expected '
                f"{kind or 'one with a text'}. Give it that title in ComfyUI and export the "
                "workflow again."
            )
        return titled

    def _texts(self) -> list[tuple[str, str]]:
        """(number, input) of each text that says what belongs into the hole."""
        places = []
        for number in self._titled("Label"):
            inputs = self.nodes[number]["inputs"]
            names = [name for name in TEXTS if isinstance(inputs.get(name), str)]
            if not names:
                raise WorkflowError(
                    f'{self.name}: a node titled "Label" has no text of its own; expected a '
                    "PrimitiveString or a CLIPTextEncode with the text typed into it."
                )
            places.append((number, names[0]))
        return places

    def _seeds(self) -> list[tuple[str, str]]:
        """(number, input) of each seed."""
        places = []
        problem = "no seed"
        for number, node in self.nodes.items():
            for name in SEEDS:
                if isinstance(node["inputs"].get(name), list):
                    problem = "a seed that comes from another node"
                elif name in node["inputs"]:
                    places.append((number, name))
        if not places or problem != "no seed":
            raise WorkflowError(
                f"{self.name} has {problem}; expected a sampler with the seed typed into it."
            )
        return places

    def _output(self) -> str:
        """Number of the node that shows the finished picture."""
        outputs = [number for number, node in self.nodes.items() if node["class_type"] in OUTPUTS]
        if len(outputs) != 1:
            raise WorkflowError(
                f"{self.name} has {len(outputs)} nodes of {' or '.join(OUTPUTS)}; expected one, "
                "for the finished picture."
            )
        return outputs[0]

    def _change(self, change: str) -> None:
        place, equals, value = change.partition("=")
        title, dot, name = place.rpartition(".")
        if not (equals and dot):
            raise WorkflowError(
                f"{change!r} is not a change; expected TITLE.input=value, such as "
                "Checkpoint.ckpt_name=sd15.safetensors."
            )
        nodes = [node for node in self.nodes.values() if _title(node) == title]
        if not nodes:
            titles = ", ".join(sorted(set(map(_title, self.nodes.values())) - {""}))
            raise WorkflowError(
                f'{self.name} has no node titled "{title}"; its titles are {titles or "missing"}.'
            )
        for node in nodes:
            values = _typed_values(node)
            if name not in values:
                raise WorkflowError(
                    f"{self.name}: {title} has no value {name} to change; it has "
                    f"{', '.join(values) or 'none'}."
                )
            try:
                node["inputs"][name] = _like(values[name], value)
            except ValueError as error:
                raise WorkflowError(
                    f"{change!r}: expected a value like {json.dumps(values[name])}."
                ) from error


def _read(path: Path) -> dict[str, dict]:
    try:
        nodes = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise WorkflowError(
            f"{path} cannot be read ({error.strerror}); expected a workflow in API format."
        ) from error
    except ValueError as error:
        raise WorkflowError(
            f"{path} is not JSON ({error}); expected a workflow in API format."
        ) from error
    if isinstance(nodes, dict) and isinstance(nodes.get("nodes"), list):
        raise WorkflowError(
            f"{path} is a workflow for the canvas; expected API format. Open it in ComfyUI and "
            "choose Workflow, Export (API)."
        )
    if not isinstance(nodes, dict) or not nodes or not all(map(_is_node, nodes.values())):
        raise WorkflowError(
            f"{path} is no workflow in API format; expected nodes with class_type and inputs."
        )
    return nodes


def _is_node(node) -> bool:
    return (
        isinstance(node, dict)
        and isinstance(node.get("class_type"), str)
        and isinstance(node.get("inputs"), dict)
    )


def _title(node: dict) -> str:
    return node.get("_meta", {}).get("title", "")


def _typed_values(node: dict) -> dict:
    """A node's inputs that do not come from another node."""
    values = {}
    for name, value in node["inputs"].items():
        if value is not None and not isinstance(value, list):
            values[name] = value
    return values


def _like(present, text: str):
    """The value that a text means where `present` stands now; raises ValueError."""
    return text if isinstance(present, str) else json.loads(text)


class RemoteServer:
    """A ComfyUI that is running somewhere. Every method raises Gone where it does not answer."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.answered = time.monotonic()  # when it last did
        without_proxies = urllib.request.ProxyHandler({})  # servers are reached directly
        self._open = urllib.request.build_opener(without_proxies).open

    def alive(self) -> bool:
        """Whether it answers."""
        try:
            self._json("/system_stats")
        except Gone:
            return False
        return True

    def upload(self, name: str, content: bytes) -> str:
        """Put a PNG into the server's input folder, over one of that name.

        Returns what LoadImage calls it.
        """
        boundary = uuid.uuid4().hex
        fields = {"type": "input", "subfolder": "generate", "overwrite": "true"}
        head = ""
        for key, value in fields.items():
            head += f"--{boundary}\r\n"
            head += f'Content-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'
        head += f"--{boundary}\r\n"
        head += f'Content-Disposition: form-data; name="image"; filename="{name}"\r\n'
        head += "Content-Type: image/png\r\n\r\n"
        body = head.encode() + content + f"\r\n--{boundary}--\r\n".encode()
        answer = self._json("/upload/image", body, f"multipart/form-data; boundary={boundary}")
        return f"{answer['subfolder']}/{answer['name']}"

    def queue(self, prompt: dict) -> str:
        """Queue a prompt, returns its id; raises Refused with the server's reasons."""
        body = json.dumps({"prompt": prompt}).encode()
        return self._json("/prompt", body, "application/json")["prompt_id"]

    def wait(self, id: str, over: threading.Event) -> dict | None:
        """The history of a prompt once it has ended, however it did; None if `over` comes first."""
        pause = FIRST_PAUSE
        while not over.wait(pause):
            pause = min(1.5 * pause, MOST_PAUSE)
            ended = self._history(id)
            if ended is None and not self._queued(id):
                ended = self._history(id)  # it may have ended between the two questions
                if ended is None:
                    raise Gone("it has forgotten a prompt, so it was restarted")
            if ended is not None:
                return ended
        return None

    def view(self, image: dict) -> bytes:
        """A picture that a prompt made, as named in its history."""
        place = {key: image[key] for key in ("filename", "subfolder", "type")}
        return self._request(f"/view?{urllib.parse.urlencode(place)}")

    def _history(self, id: str) -> dict | None:
        return self._json(f"/history/{id}").get(id)

    def _queued(self, id: str) -> bool:
        queue = self._json("/queue")
        return any(item[1] == id for item in queue["queue_running"] + queue["queue_pending"])

    def _json(self, path: str, body: bytes | None = None, kind: str | None = None) -> dict:
        content = self._request(path, body, kind)
        try:
            return json.loads(content)
        except ValueError as error:
            raise Refused(
                f"{self.url} answers {path} with {content[:60]!r}; expected a ComfyUI server."
            ) from error

    def _request(self, path: str, body: bytes | None = None, kind: str | None = None) -> bytes:
        headers = {"Content-Type": kind} if kind else {}
        request = urllib.request.Request(self.url + path, body, headers)
        try:
            content = self._answer(request)
        except (OSError, http.client.HTTPException) as error:
            raise Gone(f"it does not answer ({getattr(error, 'reason', error)})") from error
        self.answered = time.monotonic()
        return content

    def _answer(self, request: urllib.request.Request) -> bytes:
        """What the server sends back; raises Refused, or whatever a connection raises."""
        try:
            with self._open(request, timeout=TIMEOUT) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            if error.code in GATEWAY_ERRORS:
                raise
            path = request.full_url.removeprefix(self.url).partition("?")[0]
            raise Refused(
                f"{self.url} refuses {path} ({error.code}): {_reasons(error.read())}"
            ) from error


def _reasons(content: bytes) -> str:
    """What a refusal says: the errors of the prompt and its nodes, or the beginning of the text."""
    try:
        answer = json.loads(content)
        reasons = [answer["error"]["message"]]
        for node in (answer.get("node_errors") or {}).values():
            for error in node["errors"]:
                reasons.append(f"{node['class_type']}: {error['message']}, {error['details']}")
        return "; ".join(reasons)
    except (ValueError, KeyError, TypeError, AttributeError):
        return content[:200].decode(errors="replace") or "no reason given"
