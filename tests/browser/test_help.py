"""The help page of every node, opened as a user does: select the node, press Info."""

import re

import pytest
from paths import ROOT

DOCS = ROOT / "web/docs"
ENGLISH = {path.stem for path in DOCS.glob("*.md")}
CHINESE = {path.parent.name for path in DOCS.glob("*/zh.md")}
NODES = sorted(ENGLISH | CHINESE)


@pytest.mark.parametrize("file", ["{}.md", "{}/zh.md"])
def test_every_node_has_a_page(canvas, file):
    nodes = canvas.nodes()
    assert [node for node in nodes if not (DOCS / file.format(node)).exists()] == []
    assert set(NODES) <= set(nodes)


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("locale, file", [("en", "{}.md"), ("zh", "{}/zh.md")])
def test_page_opens(canvas, node, locale, file):
    text = (DOCS / file.format(node)).read_text("utf-8")
    heading = re.search(r"^# (.+)$", text, re.MULTILINE)[1].strip()
    pictures = len(re.findall(r"!\[.*?\]\(|<img ", text))
    canvas.build({"node": [node, {}]}, [])
    canvas.render("nodes2")
    canvas.page.get_by_test_id("node-title").click()
    canvas.page.get_by_test_id("info-button").click()
    help = canvas.page.locator(".node-help-content")
    help.get_by_role("heading", name=heading, exact=True).first.wait_for()
    canvas.screenshot(f"help_{node}_{locale}")
    loaded = help.locator("img").evaluate_all("all => all.map(({naturalWidth}) => naturalWidth)")
    assert pictures > 0, "a help page needs a picture"
    assert len(loaded) == pictures
    assert all(width > 0 for width in loaded)
