"""What a file's header says of the things that its model knows."""

import json

import pytest
from paths import ROOT

from cat_diffusion.cat_core import weights
from cat_diffusion.cat_core.knowledge import Knowledge
from demo_model import recipe

KNOWN = Knowledge(("red star", "blue ring", "Fire hydrant", "星星"), 128)


def test_a_header_says_it_again():
    header = KNOWN.header()
    assert all(isinstance(value, str) for value in header.values())
    assert Knowledge.of_header({"format": "cat-diffusion", **header}) == KNOWN


def test_a_header_without_it_says_nothing():
    assert Knowledge().header() == {}
    assert Knowledge.of_header({"format": "cat-diffusion"}) == Knowledge()


@pytest.mark.parametrize("labels", ["", "{", "5", '{"a": 1}', '["a", 5]', "[" * 100_000, "null"])
@pytest.mark.parametrize("size", ["", "-1", "0", "1.5", "x", "9" * 5000, "²", "100001"])
def test_what_cannot_be_read_is_not_said(labels, size):
    assert Knowledge.of_header({"labels": labels, "picture_size": size}) == Knowledge()


@pytest.mark.parametrize("label", ["red star", " RED  star\n", "fire hydrant", "星星"])
def test_a_known_name_has_no_substitutes(label):
    assert KNOWN.nearest_to(label) == []


@pytest.mark.parametrize(
    "label, nearest",
    [
        ("scarlet star", "red star"),
        ("hydrants", "Fire hydrant"),
        ("rings", "blue ring"),
        ("星", "星星"),
    ],
)
def test_an_unknown_name_has_the_most_similar_known_ones(label, nearest):
    assert KNOWN.nearest_to(label)[0] == nearest
    assert len(KNOWN.nearest_to(label)) == 3


def test_where_no_names_are_listed_all_are_known():
    assert Knowledge((), 128).nearest_to("anything") == []


def test_a_long_text_is_compared_by_its_beginning():
    assert KNOWN.nearest_to("red stars" + " and more" * 100_000)[0] == "red star"


def test_the_bundled_model_says_what_its_recipe_writes():
    file = weights.read(ROOT / "models/cat_demo_model.safetensors")
    assert file.knowledge == recipe.KNOWLEDGE
    assert "red star" in file.knowledge.labels
    assert json.loads(file.metadata["labels"]) == list(file.knowledge.labels)
