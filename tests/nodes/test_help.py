"""Help pages and translations say what the nodes are.

No input, error or picture that does not exist, and none left out.
"""

import ast
import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from paths import ROOT
from PIL import Image

from cat_diffusion.nodes import extension
from cat_diffusion.nodes.host import messages

DOCS = ROOT / "web/docs"
CHINESE = ROOT / "locales/zh"


class Page(NamedTuple):
    """A help page that there should be."""

    node: str
    path: Path

    @property
    def text(self) -> str:
        return self.path.read_text("utf-8")

    @property
    def is_english(self) -> bool:
        return self.path.parent == DOCS


@pytest.fixture(scope="module")
def nodes():
    """Node id -> what a browser is told of it."""
    pack = asyncio.run(extension.comfy_entrypoint())
    known = {}
    for node in asyncio.run(pack.get_node_list()):
        info = node.GET_NODE_INFO_V1()
        known[info["name"]] = info
    return known


@pytest.fixture(scope="module")
def chinese():
    return json.loads((CHINESE / "nodeDefs.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def pages(nodes):
    pages = []
    for node in nodes:
        pages.append(Page(node, DOCS / f"{node}.md"))
        pages.append(Page(node, DOCS / node / "zh.md"))
    return pages


def inputs(info) -> dict[str, dict]:
    """Input id -> its options."""
    options = {}
    for kind in ("required", "optional"):
        for name, value in info["input"].get(kind, {}).items():
            options[name] = value[1] if len(value) > 1 else {}
    return options


# Pages ----------------------------------------------------------------------------------------


def test_every_node_has_both_pages_and_nothing_else_has(nodes, pages, chinese):
    assert set(DOCS.rglob("*.md")) == {page.path for page in pages}
    for page in pages:
        names = nodes if page.is_english else chinese
        title = names[page.node]["display_name"]
        assert page.text.startswith(f"# {title}\n"), page.path


def test_every_page_says_what_to_look_at_when_the_result_is_poor(pages):
    for page in pages:
        heading = "When the result is poor" if page.is_english else "效果不好时"
        assert f"\n## {heading}\n\n" in page.text, page.path


def test_pictures_exist_and_are_small(pages):
    """ComfyUI takes relative addresses as relative to docs/, for NODE/zh.md too.

    It does so for pictures only. GitHub takes them as relative to NODE/, where a copy lies.
    """
    used = set()
    for page in pages:
        pictures = re.findall(r"!\[[^\]]+\]\(([^)\s]+)\)", page.text)
        assert pictures, f"{page.path} has no picture"
        for picture in pictures:
            used.add(DOCS / picture)
            on_github = page.path.parent / picture
            used.add(on_github)
            assert on_github.read_bytes() == (DOCS / picture).read_bytes(), picture
            assert (DOCS / picture).stat().st_size <= 60 * 1024, picture
            assert Image.open(DOCS / picture).width <= 640, picture
        links = re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)", page.text)
        assert all(link.startswith("https://") for link in links), (page.path, links)
    assert used == {path for path in DOCS.rglob("*") if path.suffix in (".png", ".jpg")}


def test_bold_names_are_inputs_or_outputs(nodes, pages, chinese):
    for page in pages:
        if page.is_english:
            info = nodes[page.node]
            known = {*inputs(info), *info["output_name"]}
        else:
            names = chinese[page.node]
            entries = [*names["inputs"].values(), *names["outputs"].values()]
            known = {entry["name"] for entry in entries if "name" in entry}
        bold = set(re.findall(r"\*\*(.+?)\*\*", page.text))
        assert bold <= known, f"{page.path}: {bold - known}"


def test_quoted_errors_are_in_the_code(pages):
    """The fragments at the beginning of a line under the last heading.

    … stands for what the node fills in.
    """
    said = []
    for folder in ("nodes", "cat_core"):
        for path in (ROOT / folder).rglob("*.py"):
            said += sentences(ast.parse(path.read_text("utf-8")))
    explained = {}
    for page in pages:
        quoted = quoted_errors(page.text)
        explained.setdefault(page.node, []).append(quoted)
        for fragment in quoted:
            pattern = re.compile(".*".join(map(re.escape, fragment.split("…"))), re.DOTALL)
            assert any(map(pattern.search, said)), f"{page.path}: no error says {fragment!r}"
    for node, (english, other) in explained.items():
        assert english == other, f"{node}: the pages explain different errors"


def quoted_errors(page: str) -> list[str]:
    """What stands in quotes before the dash of each item under the last heading."""
    quoted = []
    for line in page.rpartition("\n## ")[2].splitlines():
        if line.startswith("- `"):
            before_dash = re.split(" — |— ", line)[0]
            quoted += re.findall(r"`([^`]+)`", before_dash)
    return quoted


def sentences(tree: ast.AST) -> Iterator[str]:
    """All texts of a module, with … where values are filled in."""
    inner = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inner.update(id(part) for part in node.values)
            yield "".join(
                part.value if isinstance(part, ast.Constant) else "…" for part in node.values
            )
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and id(node) not in inner:
            yield node.value


# Translations ---------------------------------------------------------------------------------


def test_chinese_names_everything_once(nodes, chinese):
    assert set(chinese) == set(nodes)
    for node, info in nodes.items():
        names = chinese[node]
        assert set(names) == {"display_name", "description", "inputs", "outputs"}
        assert set(names["inputs"]) == set(inputs(info)), node
        for name, options in inputs(info).items():
            expected = {"name", "tooltip"} if options.get("tooltip") else {"name"}
            assert set(names["inputs"][name]) == expected, (node, name)
        translated = {index: set(entry) for index, entry in names["outputs"].items()}
        assert translated == output_fields(info), node


def output_fields(info) -> dict[str, set[str]]:
    """Number of an output -> what of it needs a translation; none where nothing does."""
    tooltips = info["output_tooltips"] or [None] * len(info["output"])
    fields = {}
    for index, kind in enumerate(info["output"]):
        needed = set()
        # An output called like its type is named by ComfyUI's own list of types.
        if info["output_name"][index] != kind:
            needed.add("name")
        if tooltips[index]:
            needed.add("tooltip")
        if needed:
            fields[str(index)] = needed
    return fields


def test_chinese_names_the_categories(nodes):
    known = json.loads((CHINESE / "main.json").read_text("utf-8"))["nodeCategories"]
    for info in nodes.values():
        assert set(info["category"].split("/")) <= set(known)


def test_what_nodes_say_is_chinese_too():
    """The templates in the code are those of locales/zh, with the same values filled in."""
    templates = set()
    for path in (ROOT / "nodes").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            name = node.func if isinstance(node, ast.Call) else None
            if "sentence" in (getattr(name, "id", None), getattr(name, "attr", None)):
                templates.add(ast.literal_eval(node.args[0]))
    translated = json.loads((CHINESE / "sentences.json").read_text("utf-8"))
    assert set(translated) == templates
    for english, other in translated.items():
        fields = [set(re.findall(r"{\w+", text)) for text in (english, other)]
        assert fields[0] == fields[1], english


def test_a_node_speaks_the_language_of_the_canvas(monkeypatch, caplog):
    caplog.set_level("INFO")
    shown = []
    monkeypatch.setattr(messages.symbols, "show_on_node", shown.append)
    notes = [messages.sentence("The mask of {empty} of {all} pictures is empty.", empty=1, all=2)]
    notes.append(messages.sentence("{cat_model}", cat_model="a {file}"))
    for locale in ("en", "zh", "zh-TW", "fr", "../en"):
        monkeypatch.setattr(messages.symbols, "locale_of_user", lambda locale=locale: locale)
        messages.say(*notes)
    english = "The mask of 1 of 2 pictures is empty. a {file}"
    chinese = "2 张图片中有 1 张的遮罩是空的。a {file}"
    assert shown == [english, chinese, chinese, english, english]
    assert caplog.messages == [f"CAT-Diffusion: {english}"] * 5
    messages.say()
    assert len(shown) == 5


def test_translations_hold_no_characters_with_a_meaning(chinese):
    """The browser's translator reads {}, @ and | as its own signs and shows something else."""
    for text in texts(chinese):
        assert not re.search(r"[{}@|]", text)
        assert text
        assert text.strip() == text


def texts(value) -> list[str]:
    """All texts at the leaves."""
    if isinstance(value, str):
        return [value]
    leaves = []
    for inner in value.values():
        leaves += texts(inner)
    return leaves
