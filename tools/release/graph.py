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


SEED = "Seed"  # title of a number that several samplers share
# How the canvas draws nodes and the groups around them, in its units.
TITLE = 30  # height of a node's title
COLLAPSED = 10  # between a collapsed node and the next
BETWEEN = 16  # between a node and the next
HEAD = 40  # a group's title
MARGIN = 10  # between a group's border and its nodes
APART = 14  # between a group and the next
# Colours of the groups, readable on light and dark canvases.
COLOURS = {"photo": "#3f789e", "text": "#8a6", "draw": "#a1309b", "result": "#b58b2a", "": "#777"}


@dataclass(frozen=True)
class PlacedNode:
    """A node on the canvas; node[2] is its third output. With no height it is collapsed."""

    id: int
    kind: str
    height: int | None
    title: str | None
    inputs: dict[str, object]  # values, and outputs of other nodes

    @property
    def is_of_pack(self) -> bool:
        """Whether it is one of CAT-Diffusion's own."""
        return self.kind.startswith("CAT")

    @property
    def is_drawn_anew(self) -> bool:
        """Whether the next run has another seed: where one expects another picture."""
        return self.kind == "KSampler" or self.title == SEED

    @property
    def below(self) -> int:
        """How far below its title's upper edge the next node begins."""
        return TITLE + COLLAPSED if self.height is None else TITLE + self.height + BETWEEN

    def __getitem__(self, output: int) -> Output:
        return self.id, output


@dataclass(frozen=True)
class Note:
    """A text on the canvas, in Markdown.

    web/js/language.js opens the one in the page's language.
    """

    height: int
    text: str
    language: str
    is_open: bool

    @property
    def below(self) -> int:
        """How far below its title's upper edge the next node begins."""
        return TITLE + self.height + BETWEEN if self.is_open else TITLE + COLLAPSED


@dataclass(eq=False)
class Step:
    """Nodes below each other in a coloured group, whose title is what one does there.

    Without a title there is no group around them.
    """

    graph: "Graph"
    title: str
    colour: str
    items: list["PlacedNode | Note"] = field(default_factory=list)

    def add(
        self, kind: str, *, height: int | None = None, title: str | None = None, **inputs
    ) -> PlacedNode:
        """Place a node below the others; an input is a value or another node's output.

        Inputs that are not given have the host's defaults.

        Args:
            height: without its title; None collapses it.
        """
        node = self.graph.node(kind, height, title, inputs)
        self.items.append(node)
        return node

    def note(self, text: str, chinese: str, *, height: int) -> None:
        """Place a note in both languages, the Chinese one collapsed.

        In the English text a line that begins with blanks continues the one before.
        """
        self.items.append(Note(height, re.sub(r"\n +", " ", text), "en", True))
        self.items.append(Note(height, chinese, "zh", False))

    @property
    def head(self) -> int:
        """Height of what is above the nodes."""
        return HEAD if self.title else 0

    @property
    def tall(self) -> int:
        """Height of all of it."""
        height = self.head + sum(item.below for item in self.items)
        return height + MARGIN - BETWEEN if self.title else height - BETWEEN


@dataclass(eq=False)
class Column:
    """Steps below each other, all their nodes of one width."""

    graph: "Graph"
    width: int
    steps: list[Step] = field(default_factory=list)

    def step(self, title: str = "", colour: str = "") -> Step:
        """Begin a step below the others; its colour is one of COLOURS."""
        step = Step(self.graph, title, COLOURS[colour])
        self.steps.append(step)
        return step


@dataclass
class Graph:
    """Nodes, in the order in which they were added, and the columns that they stand in."""

    info: dict  # the host's /object_info
    nodes: list[PlacedNode] = field(default_factory=list)
    columns: list[Column] = field(default_factory=list)

    def column(self, width: int) -> Column:
        """Begin a column to the right of the others."""
        column = Column(self, width)
        self.columns.append(column)
        return column

    def node(self, kind: str, height: int | None, title: str | None, inputs: dict) -> PlacedNode:
        """A node with the host's defaults for the inputs that are not given."""
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
        node = PlacedNode(len(self.nodes) + 1, kind, height, title, defaults | inputs)
        self.nodes.append(node)
        return node

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
        nodes = {}
        notes = []
        groups = []
        left = 0
        for column in self.columns:
            top = 0
            for step in column.steps:
                if step.title:
                    groups.append(_drawn_group(step, len(groups) + 1, left, top, column.width))
                y = top + step.head + TITLE
                for item in step.items:
                    if isinstance(item, Note):
                        number = len(self.nodes) + len(notes) + 1
                        notes.append(_drawn_note(item, number, (left, y), column.width))
                    else:
                        nodes[item.id] = self._drawn(item, (left, y), column.width)
                    y += item.below
                top += step.tall + APART
            left += column.width + 2 * MARGIN + APART
        drawn = [nodes[node.id] for node in self.nodes]
        links = self._link(drawn)
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"cat-diffusion/{name}")),
            "revision": 0,
            "last_node_id": len(drawn) + len(notes),
            "last_link_id": len(links),
            "nodes": drawn + notes,
            "links": links,
            "groups": groups,
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

    def _drawn(self, node: PlacedNode, at: Pair, width: int) -> dict:
        """A node without its links."""
        inputs = []
        values = []
        for name, spec in self.specs(node.kind).items():
            type_ = "COMBO" if isinstance(spec[0], list) else spec[0]
            slot = {"name": name, "type": type_, "link": None}
            if type_ in _WIDGETS:
                slot["widget"] = {"name": name}
                values += _widget_values(node.inputs.get(name), _options(spec), node.is_drawn_anew)
            inputs.append(slot)
        drawn = {
            "id": node.id,
            "type": node.kind,
            "pos": list(at),
            "size": [width, node.height or 100],
            "flags": {"collapsed": True} if node.height is None else {},
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


def _widget_values(value: object, options: dict, is_drawn_anew: bool) -> list:
    """What an input's widgets show: its value, and those of the widgets that it brings along."""
    if isinstance(value, tuple):
        value = options.get("default", "")
    values = [value]
    if options.get("control_after_generate"):
        values.append("randomize" if is_drawn_anew else "fixed")
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


def _drawn_group(step: Step, id: int, left: int, top: int, width: int) -> dict:
    return {
        "id": id,
        "title": step.title,
        "bounding": [left - MARGIN, top, width + 2 * MARGIN, step.tall],
        "color": step.colour,
        "font_size": 22,
        "flags": {},
    }


_NOTE_TITLES = {"en": "Note", "zh": "中文说明"}


def _drawn_note(note: Note, id: int, at: Pair, width: int) -> dict:
    return {
        "id": id,
        "type": "MarkdownNote",
        "pos": list(at),
        "size": [width, note.height],
        "flags": {} if note.is_open else {"collapsed": True},
        "order": id - 1,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": _NOTE_TITLES[note.language],
        "properties": {"cat-diffusion language": note.language},
        "widgets_values": [note.text],
        "color": "#432",
        "bgcolor": "#653",
    }
