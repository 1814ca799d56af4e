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
