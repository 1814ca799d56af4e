"""Choices and notes in the language of the page; a workflow keeps the values themselves."""

import json

import pytest
from paths import ROOT

RENDERERS = ["classic", "nodes2"]
LABEL = """([name, widget]) => {
    const {options, value} = window.nodes[name].widgets.find((one) => one.name === widget);
    return [options.getOptionLabel(value), value];
}"""


@pytest.mark.parametrize("renderer", RENDERERS)
@pytest.mark.parametrize(
    "locale, fill, scene", [("zh", "灰色", "方形洞"), ("en", "grey", "square")]
)
def test_choices_speak_the_pages_language(canvas, renderer, locale, fill, scene):
    canvas.build(
        {
            "conditioning": ("CATInpaintConditioning", {"fill": "grey"}),
            "scene": ("CATDemoScene", {"scene": "square hole"}),
        },
        [],
    )
    canvas.render(renderer)

    label, value = canvas.run(LABEL, ["conditioning", "fill"])
    assert label == fill
    assert value == "grey"
    label, value = canvas.run(LABEL, ["scene", "scene"])
    assert label.startswith(scene)
    assert value == "square hole"
    if renderer == "nodes2":
        canvas.until("(text) => document.body.innerText.includes(text)", fill)
    canvas.screenshot(f"choices_{renderer}_{locale}")


def test_every_choice_has_a_chinese_name(canvas):
    """The lists of the page against those of the nodes."""
    canvas.build(
        {"conditioning": ("CATInpaintConditioning", {}), "scene": ("CATDemoScene", {})}, []
    )
    canvas.set("Comfy.Locale", "zh")
    named = canvas.run("""() => Object.values(window.nodes).flatMap(({widgets}) =>
        widgets.filter(({options}) => options?.getOptionLabel).flatMap(({options}) =>
            options.values.map((value) => [value, options.getOptionLabel(value)])))""")
    canvas.set("Comfy.Locale", "en")
    assert len(named) >= 8
    for value, label in named:
        assert label != value, value


@pytest.mark.parametrize("renderer", RENDERERS)
@pytest.mark.parametrize("locale, word", [("zh", "无需下载"), ("en", "Nothing to download")])
def test_the_open_note_is_in_the_pages_language(canvas, renderer, locale, word):
    workflow = json.loads((ROOT / "workflows/cat_demo.json").read_text("utf-8"))
    canvas.drop("cat_demo", workflow)
    canvas.render(renderer)
    notes = canvas.run("""() => app.graph.nodes.filter(({type}) => type === "MarkdownNote")
        .map(({flags, widgets}) => [Boolean(flags.collapsed), widgets[0].value])""")
    assert len(notes) == 2
    for is_collapsed, text in notes:
        assert (word in text) is not is_collapsed
    canvas.until("(text) => document.body.innerText.includes(text)", word)
    canvas.screenshot(f"note_{renderer}_{locale}")


WORKFLOWS = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
SAME = {"SD 1.5", "ControlNet"}  # in both languages


def test_titles_are_in_the_pages_language_and_come_back(canvas):
    canvas.speak("zh")
    in_chinese = {}
    for name in WORKFLOWS:
        workflow = json.loads((ROOT / f"workflows/{name}.json").read_text("utf-8"))
        canvas.drop(name, workflow)
        in_chinese[name] = canvas.run("() => app.graph.serialize()")
        assert not own_titles(workflow) & own_titles(in_chinese[name])
    canvas.screenshot("titles_zh")
    canvas.speak("en")
    for name in WORKFLOWS:
        workflow = json.loads((ROOT / f"workflows/{name}.json").read_text("utf-8"))
        canvas.drop(name, in_chinese[name])
        assert own_titles(workflow) <= own_titles(canvas.run("() => app.graph.serialize()"))


def own_titles(workflow):
    """The titles of a workflow's groups and nodes that are not the same in both languages."""
    titles = {group["title"] for group in workflow["groups"]}
    titles |= {node["title"] for node in workflow["nodes"] if node.get("title")}
    notes = {node["title"] for node in workflow["nodes"] if node["type"] == "MarkdownNote"}
    return titles - notes - SAME
