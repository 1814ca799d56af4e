"""A workflow under construction, and its two forms: for ComfyUI's canvas, and for scripts."""

import re
import uuid
from dataclasses import dataclass, field

CAT_PACK = {"cnr_id": "cat-diffusion", "ver": "0.2.0"}
COMFYUI = {"cnr_id": "comfy-core", "ver": "0.16.3"}
HUGGING_FACE = "https://huggingface.co/"
# Files that ComfyUI can offer to download: their folder and their address on Hugging Face. CAT
# weights are not among them: nobody has published any.
MODELS = {
    "sd-v1-5-inpainting.ckpt": (
        "checkpoints",
        "stable-diffusion-v1-5/stable-diffusion-inpainting/resolve/main/sd-v1-5-inpainting.ckpt",
    ),
    "clip_vit_large_patch14.safetensors": (
        "clip_vision",
        "openai/clip-vit-large-patch14/resolve/main/model.safetensors",
    ),
    "control_v11p_sd15_canny_fp16.safetensors": (
        "controlnet",
        "comfyanonymous/ControlNet-v1-1_fp16_safetensors/resolve/main/"
        "control_v11p_sd15_canny_fp16.safetensors",
    ),
}
_WIDGETS = ("COMBO", "INT", "FLOAT", "STRING", "BOOLEAN")  # inputs of these types are typed in

Output = tuple[int, int]  # a node's id and which of its outputs
Pair = tuple[int, int]  # x and y, or width and height, in units of the canvas


@dataclass(frozen=True)
class PlacedNode:
    """A node on the canvas; node[2] is its third output."""

    id: int
    kind: str
    at: Pair
    size: Pair
    title: str | None
    inputs: dict[str, object]  # values, and outputs of other nodes

    @property
    def is_of_pack(self) -> bool:
        """Whether it is one of CAT-Diffusion's own."""
        return self.kind.startswith("CAT")

    def __getitem__(self, output: int) -> Output:
        return self.id, output


@dataclass(frozen=True)
class Note:
    """A text on the canvas, in Markdown."""

    at: Pair
    size: Pair
    text: str


@dataclass
class Graph:
    """Nodes, in the order in which they were added, and notes."""

    info: dict  # the host's /object_info
    nodes: list[PlacedNode] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    def add(
        self, kind: str, *, at: Pair, size: Pair, title: str | None = None, **inputs
    ) -> PlacedNode:
        """Place a node; an input is a value or another node's output, such as node[0].

        Inputs that are not given have the host's defaults.
        """
        specs = self.specs(kind)
        unknown = set(inputs) - set(specs)
        if unknown:
            raise ValueError(
                f"{kind} has no input {', '.join(unknown)}; expected {', '.join(specs)}"
            )
        defaults = {}
        for name, spec in specs.items():
            if "default" in _options(spec):
                defaults[name] = _options(spec)["default"]
        node = PlacedNode(len(self.nodes) + 1, kind, at, size, title, defaults | inputs)
        self.nodes.append(node)
        return node

    def note(self, text: str, *, at: Pair, size: Pair) -> None:
        """Place a note; in its text a line that begins with blanks continues the one before."""
        self.notes.append(Note(at, size, re.sub(r"\n +", " ", text)))

    def specs(self, kind: str) -> dict:
        """The inputs of a class of nodes by name, as the host describes them, in its order."""
        inputs = self.info[kind]["input"]
        return inputs["required"] | inputs.get("optional", {})

    def api(self) -> dict:
        """What scripts post to /prompt."""
        prompt = {}
        for node in self.nodes:
            described: dict = {"class_type": node.kind}
            if node.title:
                described["_meta"] = {"title": node.title}
            described["inputs"] = self._api_inputs(node)
            prompt[str(node.id)] = described
        return prompt

    def _api_inputs(self, node: PlacedNode) -> dict:
        inputs = {}
        for name in self.specs(node.kind):
            value = node.inputs.get(name)
            if isinstance(value, tuple):
                inputs[name] = [str(value[0]), value[1]]
            elif value is not None:
                inputs[name] = value
        return inputs

    def canvas(self, name: str) -> dict:
        """What is dropped onto the canvas; its id is made of the name."""
        nodes = [self._drawn(node) for node in self.nodes]
        links = self._link(nodes)
        notes = []
        for number, note in enumerate(self.notes, len(nodes) + 1):
            notes.append(_drawn_note(note, number))
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"cat-diffusion/{name}")),
            "revision": 0,
            "last_node_id": len(nodes) + len(notes),
            "last_link_id": len(links),
            "nodes": nodes + notes,
            "links": links,
            "groups": [],
            "config": {},
            "extra": {},
            "version": 0.4,
        }

    def _link(self, drawn: list[dict]) -> list[list]:
        """Write links into the drawn nodes' inputs and outputs; returns the canvas's list of them.

        A link is its number, the node and output it comes from, the node and input it goes to, and
        its type.
        """
        links = []
        for node in self.nodes:
            for slot, name in enumerate(self.specs(node.kind)):
                value = node.inputs.get(name)
                if not isinstance(value, tuple):
                    continue
                number = len(links) + 1
                origin_id, output = value
                origin = drawn[origin_id - 1]["outputs"][output]
                origin["links"].append(number)
                drawn[node.id - 1]["inputs"][slot]["link"] = number
                links.append([number, origin_id, output, node.id, slot, origin["type"]])
        return links

    def _drawn(self, node: PlacedNode) -> dict:
        """A node without its links."""
        inputs = []
        values = []
        for name, spec in self.specs(node.kind).items():
            type_ = "COMBO" if isinstance(spec[0], list) else spec[0]
            slot = {"name": name, "type": type_, "link": None}
            if type_ in _WIDGETS:
                slot["widget"] = {"name": name}
                values += _widget_values(node.inputs.get(name), _options(spec))
            inputs.append(slot)
        drawn = {
            "id": node.id,
            "type": node.kind,
            "pos": list(node.at),
            "size": list(node.size),
            "flags": {},
            "order": node.id - 1,
            "mode": 0,
            "inputs": inputs,
            "outputs": self._outputs(node),
            "properties": _properties(node),
            "widgets_values": values,
        }
        if node.title:
            drawn["title"] = node.title
        return drawn

    def _outputs(self, node: PlacedNode) -> list[dict]:
        info = self.info[node.kind]
        if info["output_node"] and not node.is_of_pack:
            return []  # the savers of older hosts have none
        outputs = []
        for name, type_ in zip(info["output_name"], info["output"], strict=True):
            outputs.append({"name": name, "type": type_, "links": []})
        return outputs


def _options(spec: list) -> dict:
    """What the host says of an input beside its type."""
    return spec[1] if len(spec) > 1 else {}


def _widget_values(value: object, options: dict) -> list:
    """What an input's widgets show: its value, and those of the widgets that it brings along."""
    if isinstance(value, tuple):
        value = options.get("default", "")
    values = [value]
    if options.get("control_after_generate"):
        values.append("fixed")
    if options.get("image_upload"):
        values.append("image")
    return values


def _properties(node: PlacedNode) -> dict:
    """Where a node comes from, and which of its files can be downloaded."""
    properties: dict = {"Node name for S&R": node.kind}
    properties |= CAT_PACK if node.is_of_pack else COMFYUI
    models = []
    for value in node.inputs.values():
        if isinstance(value, str) and value in MODELS:
            folder, address = MODELS[value]
            models.append({"name": value, "url": HUGGING_FACE + address, "directory": folder})
    if models:
        properties["models"] = models
    return properties


def _drawn_note(note: Note, id: int) -> dict:
    return {
        "id": id,
        "type": "MarkdownNote",
        "pos": list(note.at),
        "size": list(note.size),
        "flags": {},
        "order": id - 1,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": "Note",
        "properties": {},
        "widgets_values": [note.text],
        "color": "#432",
        "bgcolor": "#653",
    }
