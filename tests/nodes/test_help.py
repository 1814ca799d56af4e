"""Help pages and translations say what the nodes are: no input, error or picture that does not exist, and none left out."""

import ast
import asyncio
import json
import re

import pytest
from paths import ROOT
from PIL import Image

from cat_diffusion.nodes import extension

DOCS = ROOT / "web/docs"
CHINESE = ROOT / "locales/zh"


@pytest.fixture(scope="module")
def nodes():
    """Node id -> what a browser is told of it."""
    pack = asyncio.run(extension.comfy_entrypoint())
    return {
        info["name"]: info
        for info in (node.GET_NODE_INFO_V1() for node in asyncio.run(pack.get_node_list()))
    }


@pytest.fixture(scope="module")
def chinese():
    return json.loads((CHINESE / "nodeDefs.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def pages(nodes):
    """(node id, path) of all help pages that there should be."""
    return [(node, DOCS / name) for node in nodes for name in (f"{node}.md", f"{node}/zh.md")]


def inputs(info):
    """Input id -> its options."""
    return {
        name: (*value, {})[1]
        for kind in ("required", "optional")
        for name, value in info["input"].get(kind, {}).items()
    }


def test_every_node_has_both_pages_and_nothing_else_has(nodes, pages, chinese):
    assert set(DOCS.rglob("*.md")) == {path for _, path in pages}
    for node, path in pages:
        names = (nodes if path.parent == DOCS else chinese)[node]
        assert path.read_text("utf-8").startswith(f"# {names['display_name']}\n"), path


def test_pictures_exist_and_are_small(pages):
    """ComfyUI takes a page's relative addresses as relative to docs/, for NODE/zh.md too, and does so for pictures only."""
    used = set()
    for _, path in pages:
        text = path.read_text("utf-8")
        pictures = re.findall(r"!\[[^\]]+\]\(([^)\s]+)\)", text)
        assert pictures, f"{path} has no picture"
        for picture in pictures:
            used.add(DOCS / picture)
            assert (DOCS / picture).stat().st_size <= 60 * 1024, picture
            assert Image.open(DOCS / picture).width <= 640, picture
        links = re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)", text)
        assert all(link.startswith("https://") for link in links), (path, links)
    assert used == {path for path in DOCS.rglob("*") if path.suffix in (".png", ".jpg")}


def test_bold_names_are_inputs_or_outputs(nodes, pages, chinese):
    for node, path in pages:
        info, names = nodes[node], chinese[node]
        if path.parent == DOCS:
            known = {*inputs(info), *info["output_name"]}
        else:
            known = {
                entry["name"]
                for kind in ("inputs", "outputs")
                for entry in names[kind].values()
                if "name" in entry
            }
        found = set(re.findall(r"\*\*(.+?)\*\*", path.read_text("utf-8")))
        assert found <= known, f"{path}: {found - known}"


def test_quoted_errors_are_in_the_code(pages):
    """The fragments at the beginning of a line under the last heading; … stands for what the node fills in."""
    said = [
        text
        for folder in ("nodes", "cat_core")
        for path in (ROOT / folder).rglob("*.py")
        for text in sentences(ast.parse(path.read_text("utf-8")))
    ]
    counts = {}
    for node, path in pages:
        last = path.read_text("utf-8").rpartition("\n## ")[2]
        quoted = [
            fragment
            for line in last.splitlines()
            if line.startswith("- `")
            for fragment in re.findall(r"`([^`]+)`", re.split(" — |— ", line)[0])
        ]
        for fragment in quoted:
            pattern = re.compile(".*".join(map(re.escape, fragment.split("…"))), re.DOTALL)
            assert any(map(pattern.search, said)), f"{path}: no error says {fragment!r}"
        counts.setdefault(node, []).append(quoted)
    for node, (english, other) in counts.items():
        assert english == other, f"{node}: the pages explain different errors"


def sentences(tree):
    """All texts of a module, with … where values are filled in."""
    inner = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in node.values
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                part.value if isinstance(part, ast.Constant) else "…" for part in node.values
            )
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner
        ):
            yield node.value


def test_chinese_names_everything_once(nodes, chinese):
    assert set(chinese) == set(nodes)
    for node, info in nodes.items():
        names = chinese[node]
        assert set(names) == {"display_name", "description", "inputs", "outputs"}
        assert set(names["inputs"]) == set(inputs(info)), node
        for name, options in inputs(info).items():
            assert set(names["inputs"][name]) == {
                "name",
                *(["tooltip"] if options.get("tooltip") else []),
            }, (node, name)
        wanted = {}
        for index, (kind, name) in enumerate(zip(info["output"], info["output_name"])):
            tooltip = (info["output_tooltips"] or {index: None})[index]
            # An output called like its type is named by ComfyUI's own list of types.
            wanted[str(index)] = {
                *(["name"] if name != kind else []),
                *(["tooltip"] if tooltip else []),
            }
        assert {index: set(entry) for index, entry in names["outputs"].items()} == {
            index: fields for index, fields in wanted.items() if fields
        }, node


def test_chinese_names_the_categories(nodes):
    known = json.loads((CHINESE / "main.json").read_text("utf-8"))["nodeCategories"]
    assert {part for info in nodes.values() for part in info["category"].split("/")} <= set(known)


def test_translations_hold_no_characters_with_a_meaning(chinese):
    """The browser's translator reads {}, @ and | as its own signs and shows something else."""
    assert not re.search(r"[{}@|]", "".join(texts(chinese)))
    assert all(text.strip() == text and text for text in texts(chinese))


def texts(value):
    return (
        [value]
        if isinstance(value, str)
        else [text for inner in value.values() for text in texts(inner)]
    )
