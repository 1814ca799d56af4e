"""The user study's page in Chromium, from disk: rated by keys and clicks, paused, and exported."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from cat_diffusion.cat_core.data import manifest
from cat_diffusion.cat_core.evaluation import study
from cat_diffusion.cat_core.evaluation.results import Results, SampleSet

from .conftest import FLAGS

SIZE = 64
COLOURS = {"red method": (255, 0, 0), "green method": (0, 255, 0), "blue method": (0, 0, 255)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(page, key) of three methods that fill five pictures with a colour of their own."""
    folder = tmp_path_factory.mktemp("study")
    records = []
    for number in range(5):
        Image.new("RGB", (SIZE, SIZE), (60 + number,) * 3).save(folder / f"{number}.png")
        box = (0.2, 0.2, 0.8, 0.8)
        label = f"cup </script> {number}"
        records.append(manifest.Record(f"{number}", f"{number}.png", box=box, label=label))
    manifest.write(folder / "m.jsonl", records)
    folders = []
    for name, colour in COLOURS.items():
        (folder / name).mkdir()
        for number in range(5):
            Image.new("RGB", (SIZE, SIZE), colour).save(folder / name / f"{number}.png")
        folders.append(Results.open(folder / name))
    samples = SampleSet(folder / "m.jsonl", None, "box", SIZE).read()
    key = study.make_key(samples, list(COLOURS), 4, seed=3)
    page = folder / "study.html"
    page.write_text(study.study_page(key, samples, folders), encoding="utf-8")
    return page, key


def colours(tab):
    """Numbers of the methods that are shown, by what their pictures look like."""
    script = """() => [...document.querySelectorAll("#shown img")].slice(1).map((image) => {
        const canvas = document.createElement("canvas");
        const context = canvas.getContext("2d");
        context.drawImage(image, 0, 0);
        return [...context.getImageData(10, 10, 1, 1).data];
    })"""
    return [int(np.argmax(pixel[:3])) for pixel in tab.evaluate(script)]


def drive(chromium, page, folder):
    """Rate everything in two sittings; returns what was seen and the exported file."""
    from playwright.sync_api import sync_playwright

    seen = {"orders": [], "errors": [], "requests": []}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(
            folder / "profile", executable_path=chromium, args=FLAGS, locale="en-GB"
        )
        tab = browser.new_page()
        tab.on("pageerror", lambda error: seen["errors"].append(str(error)))
        tab.on("request", lambda request: seen["requests"].append(request.url))
        tab.goto(page.as_uri())
        seen["welcome"] = tab.inner_text("#welcome")
        tab.fill("#rater", "Rater One")
        tab.keyboard.press("5")  # behind the curtain, into the name
        tab.click("#start")
        seen["next before"] = tab.is_disabled("#next")
        for value in "012345":  # three results, two questions each
            tab.keyboard.press(value)
        seen["orders"].append(colours(tab))
        tab.keyboard.press("Enter")
        seen["label"] = tab.inner_text("#label")
        tab.keyboard.press("4")
        tab.keyboard.press("Enter")  # the picture is not complete
        seen["count"] = tab.inner_text("#count")
        tab.keyboard.press("p")
        seen["paused"] = tab.is_visible("#curtain")
        tab.close()

        tab = browser.new_page()  # another day
        tab.goto(page.as_uri())
        seen["kept name"] = tab.input_value("#rater")
        tab.click("#start")
        seen["kept count"] = tab.inner_text("#count")
        tab.select_option("#language", "zh")
        seen["chinese"] = tab.inner_text("#next")
        tab.select_option("#language", "en")
        for number in range(1, 4):
            seen["orders"].append(colours(tab))
            for line in range(6):
                if not (number == 1 and line == 0):
                    buttons = tab.locator(".question").nth(line).locator("button")
                    buttons.nth(number + line // 2).click()
            seen["progress"] = tab.evaluate("document.querySelector('progress').value")
            tab.click("#next")
        seen["done"] = tab.is_visible("#done")
        with tab.expect_download() as download:
            tab.click("#export")
        seen["name"] = download.value.suggested_filename
        download.value.save_as(folder / "ratings.json")
        browser.close()
    return seen


@pytest.fixture(scope="module")
def rated(chromium, made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rated")
    # In a thread, since a page of other tests may be open in this one.
    with ThreadPoolExecutor(1) as pool:
        seen = pool.submit(drive, chromium, made[0], folder).result()
    return seen, folder / "ratings.json"


def test_people_rate_by_keys_and_clicks_and_go_on_later(made, rated):
    page, key = made
    seen, _ = rated
    assert seen["errors"] == []
    assert {url.split(":")[0] for url in seen["requests"]} <= {"file", "data", "blob"}
    assert seen["welcome"] == "How good are these pictures?"
    assert seen["next before"]
    assert seen["count"] == seen["kept count"] == "2 / 4"
    assert seen["label"] == f"To be drawn into the hole: cup </script> {key.ids[1]}"
    assert seen["paused"]
    assert seen["kept name"] == "Rater One5"
    assert seen["chinese"] == "下一张"
    assert seen["progress"] == 4
    assert seen["done"]
    assert seen["name"] == "ratings_Rater_One5.json"
    # What is shown where is what the key says, and the page does not.
    assert seen["orders"] == key.orders
    assert len({tuple(order) for order in key.orders}) > 1
    text = page.read_text("utf-8")
    assert not any(name in text for name in COLOURS)


def test_the_table_is_of_what_was_rated(made, rated):
    _, key = made
    _, path = rated
    content = json.loads(path.read_text("utf-8"))
    assert content["rater"] == "Rater One5"
    assert len(content["ratings"]) == 4 * 3 * 2
    ratings = study.read_ratings(key, [path])
    expected = np.full((2, 1, 4, 3), np.nan)
    for picture, order in enumerate(key.orders):
        for place, method in enumerate(order):
            for question in range(2):
                value = 2 * place + question if picture == 0 else picture + place
                expected[question, 0, picture, method] = value
    expected[0, 0, 1, key.orders[1][0]] = 4
    assert np.array_equal(ratings, expected)
