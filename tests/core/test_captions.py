"""Text in pictures: any text is drawn, in one line, as much of it as fits."""

import dataclasses

import pytest
import torch
from PIL import Image, ImageDraw

from cat_diffusion.cat_core.features import VisualPrompt
from cat_diffusion.cat_core.pictures import captions, plots, preview

ODD = ["two\nlines", "a\r\n\tb\u2028c", "\ud800 star", "红色星星", "\x00\x1b", "", "star " * 2000]


@pytest.fixture
def prompt():
    """A visual prompt of one picture, 8 wide."""
    features = torch.randn(1, 256, 8, generator=torch.Generator().manual_seed(0))
    return VisualPrompt(
        tokens=features[:, :64],
        before=features,
        after=features,
        patch_mask=torch.zeros(1, 1, 16, 16, dtype=torch.int64),
        picture=torch.zeros(1, 3, 224, 224, dtype=torch.uint8),
    )


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn and what is measured."""
    lines = {"text": [], "textlength": []}

    def watch(name):
        original = getattr(ImageDraw.ImageDraw, name)

        def watched(draw, *args, **keywords):
            lines[name].append(next(value for value in args if isinstance(value, str)))
            return original(draw, *args, **keywords)

        monkeypatch.setattr(ImageDraw.ImageDraw, name, watched)

    watch("text")
    watch("textlength")
    return lines


@pytest.mark.parametrize("text", ODD, ids=lambda text: ascii(text[:9]))
def test_captions_are_the_same_for_any_text(prompt, drawn, text):
    similarity = torch.linspace(-0.125, 0.875, 256)[None]
    shown = preview.preview_rows(dataclasses.replace(prompt, text=text), similarity)
    assert shown.shape == (1, 284, 936, 3)
    assert drawn["text"] == ["0 of 256", "before", "after", "-0.12 to 0.88"]
    assert all(captions.width_of(title, preview.FONT) <= preview.SIDE for title in drawn["text"])


NODE = 262  # pixels that a picture is wide on a node of the usual 300
NODE_HEIGHT = 182  # pixels that it is high there, before the node is made higher
READABLE = 11  # pixels


@pytest.mark.parametrize("panels", [3, 4])
def test_captions_can_be_read_on_the_node(prompt, panels):
    shown = preview.preview_rows(prompt, torch.zeros(1, 256) if panels == 4 else None)
    assert preview.FONT * NODE / shown.shape[2] >= READABLE


def test_plots_can_be_read_on_the_node(drawn):
    figures = {"loss": 0.1, "cosine": 0.5, "cosine_observed": 0.4}
    curves = plots.curves([figures, figures], 40_000)
    histogram = plots.histogram({"observed": [0.1, 0.4], "predicted": [0.6, 0.9]})
    assert plots.FONT * NODE / curves.width >= READABLE
    assert plots.FONT * NODE_HEIGHT / curves.height >= READABLE
    assert plots.FONT * NODE / histogram.width >= READABLE
    assert "observed 0.250" in drawn["text"]


def test_captions_are_chinese_where_there_is_a_font(prompt, drawn, monkeypatch):
    preview.preview_rows(prompt, language="zh")
    found = captions.has_letters_of("补")
    assert drawn["text"][0] == ("0/256" if found else "0 of 256")
    drawn["text"].clear()
    monkeypatch.setattr(preview, "has_letters_of", str.isascii)
    preview.preview_rows(prompt, language="zh")
    assert drawn["text"] == ["0 of 256", "before", "after"]


@pytest.mark.skipif(not captions.has_letters_of("星"), reason="no font with Chinese letters here")
def test_chinese_is_drawn_by_a_font_of_the_machine():
    pictures = []
    for line in (captions.one_line("红色星"), captions.one_line("蓝色圆")):
        picture = Image.new("L", (80, 20))
        captions.write(ImageDraw.Draw(picture), (0, 0), line, fill=255)
        pictures.append(picture.tobytes())
    assert captions.one_line("红色星") == "红色星"
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize("text", ODD, ids=lambda text: ascii(text[:9]))
def test_any_text_is_drawn_on_a_sheet(drawn, text):
    sheet = plots.sheet([(text, [Image.new("RGB", (8, 8))])], ["picture"], side=64)
    assert sheet.size == (64, 64 + 2 * plots.LINE)
    assert captions.width_of(drawn["text"][-1]) <= 64


def test_a_text_that_fits_is_left_alone(monkeypatch):
    monkeypatch.setattr(captions, "_wide_font", lambda size: None)
    assert captions.one_line("  fire\n hydrant ") == "fire hydrant"
    assert captions.one_line("café 星") == "café ?"
    assert captions.shortened("fire hydrant", captions.width_of("fire hydrant")) == "fire hydrant"


@pytest.mark.parametrize("width", [0, 5, 40, 97.5, 224, 1000])
def test_what_is_cut_is_the_longest_that_fits(width):
    line = "fire hydrant, " * 100
    short = captions.shortened(line, width)
    kept = short.removesuffix(captions.DOTS)
    assert line.startswith(kept)
    one_more = len(kept) + 2 if line[len(kept)] == " " else len(kept) + 1
    assert captions.width_of(line[:one_more] + captions.DOTS) > width
    if kept:
        assert captions.width_of(short) <= width


def test_a_long_text_is_measured_a_few_times(drawn):
    """Letter by letter, 10,000 of them were 50 million to measure."""
    plots.sheet([("star " * 2000, [Image.new("RGB", (8, 8))])], ["picture"])
    assert len(drawn["textlength"]) <= 10
    assert sum(map(len, drawn["textlength"])) < 2000
