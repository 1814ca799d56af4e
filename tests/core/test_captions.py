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
def test_any_text_is_drawn_before_the_numbers(prompt, drawn, text):
    similarity = torch.linspace(-0.125, 0.875, 256)[None]
    shown = preview.preview_rows(dataclasses.replace(prompt, text=text), similarity)
    assert shown.shape == (1, 250, 936, 3)
    title = drawn["text"][-1]
    assert title.endswith('": -0.12 black, 0.88 white')
    assert captions.width_of(title) <= preview.SIDE


@pytest.mark.parametrize("text", ODD, ids=lambda text: ascii(text[:9]))
def test_any_text_is_drawn_on_a_sheet(drawn, text):
    sheet = plots.sheet([(text, [Image.new("RGB", (8, 8))])], ["picture"], side=64)
    assert sheet.size == (64, 64 + 2 * plots.LINE)
    assert captions.width_of(drawn["text"][-1]) <= 64


def test_a_text_that_fits_is_left_alone():
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


def test_a_long_text_is_measured_a_few_times(prompt, drawn):
    """Letter by letter, 10,000 of them were 50 million to measure."""
    similarity = torch.rand(1, 256)
    preview.preview_rows(dataclasses.replace(prompt, text="star " * 2000), similarity)
    assert len(drawn["textlength"]) <= 10
    assert sum(map(len, drawn["textlength"])) < 2000
