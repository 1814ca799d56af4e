"""A user study from the command line: the page and its key, tables of ratings, and bad input."""

import json
import sys

import evaluate
import krippendorff
import numpy as np
import pytest
from conftest import grey, original

from cat_diffusion.cat_core.evaluation import study
from cat_diffusion.cat_core.evaluation.study import StudyKey

KEY = StudyKey(["plain", "cat"], ["a", "b", "c"], [[0, 1], [1, 0], [1, 0]])


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def evaluate_here(monkeypatch, capsys):
    """Run the tool in this process; returns what it says."""

    def run(*arguments, code=0):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments), "--cpu"])
        try:
            found = evaluate.main()
        except SystemExit as error:
            found = error.code
        assert found == code
        printed = capsys.readouterr()
        return printed.out + printed.err

    return run


@pytest.fixture
def save(tmp_path):
    """Write a rater's file; values are (picture, place, question, value)."""

    def save(name, values, **changes):
        names = ("picture", "result", "question", "value")
        ratings = [dict(zip(names, value, strict=True)) for value in values]
        content = {"format": study.FORMAT, "study": KEY.study, "rater": name, "ratings": ratings}
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({**content, **changes}))
        return path

    (tmp_path / "s.key.json").write_text(KEY.text())
    return save


def values_of(coherence, alignment):
    """(pictures, methods) of both questions as a page would save them."""
    values = []
    for question, table in (("coherence", coherence), ("alignment", alignment)):
        for picture, row in enumerate(table):
            for method, value in enumerate(row):
                place = KEY.orders[picture].index(method)
                values.append((picture, place, question, value))
    return values


def test_a_study_is_written_with_its_key(evaluate_here, result_folder, tmp_path):
    folders = [result_folder("plain", grey), result_folder("cat", original)]
    page = tmp_path / "out/study.html"
    options = ["--study", page, "--pictures", 5, "--seed", 4]
    said = evaluate_here(*folders, *options)
    key = StudyKey.read(tmp_path / "out/study.key.json")
    assert f"Study {key.study}: {page}" in said
    assert key.methods == ["plain", "cat"]
    assert len(set(key.ids)) == len(key.orders) == 5
    text = page.read_text("utf-8")
    assert key.study in text
    assert text.count("data:image/jpeg;base64,") == 5 * 3
    assert "http" not in text
    evaluate_here(*folders, *options)
    assert StudyKey.read(tmp_path / "out/study.key.json") == key
    evaluate_here(*folders, *options[:-1], 5)
    assert StudyKey.read(tmp_path / "out/study.key.json").study != key.study


def test_the_table_has_means_intervals_and_agreement(evaluate_here, save, tmp_path):
    first = [[1, 4], [2, 5], [0, 3]], [[3, 3], [2, 4], [1, 5]]
    second = [[2, 4], [2, 4], [1, 3]], [[3, 2], [2, 4], [0, 5]]
    files = [save("one", values_of(*first)), save("two", values_of(*second))]
    said = evaluate_here("--ratings", *files, "--key", tmp_path / "s.key.json", "--json", "m.json")
    ratings = study.read_ratings(KEY, files)
    assert np.array_equal(ratings, np.stack([first, second], axis=1))
    lines = {(line.question, line.method): line for line in study.study_lines(KEY, ratings, 500, 0)}
    cat = lines["coherence", "cat"]
    assert cat.estimate.value == pytest.approx((4 + 5 + 3 + 4 + 4 + 3) / 6)
    assert cat.difference.value == pytest.approx(cat.estimate.value - 8 / 6)
    assert cat.difference.low > 0
    assert cat.ratings == 6
    alphas = study.agreement(ratings)
    by_rater = [np.ravel(first[0]), np.ravel(second[0])]
    expected = krippendorff.alpha(reliability_data=by_rater, level_of_measurement="interval")
    assert alphas["coherence"] == pytest.approx(expected)
    assert 0.8 < alphas["coherence"] < 1
    assert "| coherence | cat | 6 | 3.833 [" in said
    assert f"Krippendorff's alpha, coherence: {expected:.3f}" in said


def test_the_interval_is_over_raters_and_pictures():
    """Raters who differ make it wide, however many pictures there are."""
    rng = np.random.default_rng(0)
    alike = rng.normal(3, 1, (1, 1, 400, 2)) + np.zeros((2, 8, 1, 1))
    apart = alike + np.linspace(-1, 1, 8).reshape(1, 8, 1, 1)
    widths = []
    for ratings in (alike, apart):
        estimate = study.study_lines(KEY, ratings, 400, 0)[0].estimate
        widths.append(estimate.high - estimate.low)
    assert widths[0] == pytest.approx(2 * 1.96 / 20, rel=0.25)
    assert widths[1] > 3 * widths[0]


def test_what_cannot_be_a_study_is_explained(evaluate_here, result_folder, save, tmp_path):
    folder = result_folder()
    page = ["--study", tmp_path / "s.html"]
    assert "There are 1 folders; a study compares 2 to 6" in evaluate_here(folder, *page, code=1)
    both = [folder, result_folder("other", grey)]
    said = evaluate_here(*both, *page, "--pictures", 9, code=1)
    assert "--pictures is 9, and there are 8. Give at most so many" in said
    said = evaluate_here(*both, "--study", tmp_path / "s", "--pictures", 3, code=1)
    assert "expected a name such as study.html" in said
    assert "give folders of finished pictures, or --ratings" in evaluate_here(code=2)

    key = ["--key", tmp_path / "s.key.json"]
    good = save("good", values_of([[1, 2]] * 3, [[1, 2]] * 3))
    assert "--ratings needs --key" in evaluate_here("--ratings", good, code=1)
    assert "--ratings needs neither" in evaluate_here(folder, "--ratings", good, code=2)
    said = evaluate_here("--ratings", good, "--key", good, code=1)
    assert "is no study's key (its format is" in said
    foreign = save("foreign", [(0, 0, "coherence", 1)], study="123")
    for paths, words in (
        ([foreign], f"is of study 123, the key of {KEY.study}. Give the key and the ratings of"),
        ([good, good], "holds the same ratings as"),
        ([save("high", [(0, 0, "coherence", 6)])], "holds a rating of 6, expected ratings from 0"),
        ([save("far", [(7, 0, "coherence", 5)])], "expected ratings from 0 to 5 of the pictures"),
        ([save("none", [])], "holds no rating. Leave it out"),
        ([tmp_path / "gone.json"], "holds no ratings ([Errno 2]"),
        ([save("half", [(0, 0, "coherence", 5)])], "A method has no rating, or none beside"),
    ):
        assert words in evaluate_here("--ratings", *paths, *key, code=1)
    said = evaluate_here("--ratings", good, *key)
    assert "Agreement on coherence is left out: it needs two raters of one picture" in said


def test_agreement_needs_its_library(save, monkeypatch, evaluate_here, tmp_path):
    good = save("good", values_of([[1, 2]] * 3, [[1, 2]] * 3))
    monkeypatch.setitem(sys.modules, "krippendorff", None)
    said = evaluate_here("--ratings", good, "--key", tmp_path / "s.key.json")
    assert "Agreement is left out: agreement needs krippendorff" in said
    assert "| alignment | cat | 3 |" in said
