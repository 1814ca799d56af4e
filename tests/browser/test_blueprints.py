"""The blueprints: found by search as a user does, and put onto the canvas."""

import pytest

from release.blueprints import ALL


@pytest.fixture
def dropped(canvas):
    """Search for a blueprint and put it onto an empty canvas."""

    def drop(name):
        canvas.run("() => app.graph.clear()")
        canvas.page.set_viewport_size({"width": 1440, "height": 900})
        canvas.page.mouse.dblclick(500, 600)
        field = canvas.page.get_by_role("combobox").or_(canvas.page.get_by_role("textbox")).last
        field.wait_for()
        canvas.page.keyboard.type(name)
        canvas.page.wait_for_timeout(1500)  # the list is filtered a while after the last letter
        canvas.page.keyboard.press("Enter")
        canvas.page.wait_for_timeout(500)
        canvas.page.mouse.click(500, 300)  # where there is a ghost of the node, it is put down
        canvas.until("() => app.graph.nodes.length === 1")

    return drop


@pytest.mark.parametrize("name", ALL)
def test_is_found_and_dropped(canvas, dropped, name):
    dropped(name)
    assert canvas.run("app.graph.nodes[0].title") == name
    widgets = canvas.run("app.graph.nodes[0].widgets.map(({name}) => name)")
    assert {"text", "strength", "clip_name", "weights"} <= set(widgets)
    assert canvas.page.locator(".p-toast-message-error").count() == 0
    canvas.screenshot(f"blueprint_{name}")
