"""Result folders, good and bad; one pass over their pictures in constant memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SIZE, grey
from paths import ROOT
from pictures import cut, mask, picture
from PIL import Image

from cat_diffusion.cat_core.data import manifest
from cat_diffusion.cat_core.evaluation import breakdown, estimates, measure, report, tables
from cat_diffusion.cat_core.evaluation.estimates import Estimate, Line
from cat_diffusion.cat_core.evaluation.metrics import EvaluationError
from cat_diffusion.cat_core.evaluation.results import Results, SampleSet, square_around_hole


def pixels(pictures):
    """An extractor that needs no weights: 27 numbers of a picture."""
    features = []
    for shown in pictures:
        levels = torch.from_numpy(np.array(shown.resize((3, 3))))
        features.append(levels.flatten().float())
    return torch.stack(features)


def measured(folders, extractor=pixels):
    """What was measured, the table's lines by metric and name, and all notes."""
    opened = [Results.open(folder) for folder in folders]
    samples, notes = sample_set(folders[0]).of_all(opened, False)
    found = measure.measure(samples, opened, extractor)
    lines, more = estimates.summary(found, 200, 20, 0)
    return found, {(line.metric, line.name): line for line in lines}, notes + more


def sample_set(folder):
    run = Results.open(folder).run
    return SampleSet(Path(run["manifest"]), run["split"], run["hole"], run["size"]).read()


# Crops --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "box, enlarge, expected",
    [
        ((40, 40, 60, 50), 1, (40, 35, 60, 55)),
        ((40, 40, 60, 60), 1.5, (35, 35, 65, 65)),
        ((0, 40, 20, 60), 2, (0, 30, 40, 70)),  # sticks out on the left
        ((90, 95, 100, 100), 2, (80, 80, 100, 100)),  # at the corner
        ((0, 0, 100, 10), 1.25, (0, 0, 100, 100)),  # cannot be larger than the picture
    ],
)
def test_the_crop_is_a_square_over_the_hole_inside_the_picture(box, enlarge, expected):
    hole = Image.new("L", (100, 100), 127)
    hole.paste(128, box)
    assert square_around_hole(hole, enlarge) == expected


# Folders ------------------------------------------------------------------------------------------


def test_the_originals_are_perfect(result_folder):
    found, lines, _ = measured([result_folder()])
    values = {metric: line.estimate.value for (metric, _), line in lines.items()}
    assert 0 <= values["fid"] < 1e-2
    assert 0 <= values["local_fid"] < 1e-2
    assert values["object_similarity"] == pytest.approx(1)
    assert values["background_mean"] == 0
    assert values["background_max"] == 0
    assert values["background_psnr"] == 100
    assert "clip_score" not in values
    assert len(found.folders[0].values["object_similarity"]) == 8
    assert all(line.difference is None for line in lines.values())


def test_every_metric_sees_what_it_should(result_folder):
    def spot(picture, hole, place):
        """One pixel of the background 9 levels off, in one picture of the eight."""
        made = grey(picture, hole, place)
        if place == 3:
            pixel = tuple(map(int, np.argwhere(np.asarray(hole).T == 0)[0]))
            off = []
            for level in picture.getpixel(pixel):
                off.append(level - 9 if level > 100 else level + 9)
            made.putpixel(pixel, tuple(off))
        return made

    folders = [result_folder("original")]
    folders.append(result_folder("grey", grey))
    folders.append(result_folder("spot", spot))
    _, lines, notes = measured(folders)
    for name in ("grey", "spot"):
        fid = lines["fid", name]
        similarity = lines["object_similarity", name]
        assert fid.estimate.value > 1
        # The object fills the crop.
        assert lines["local_fid", name].estimate.value > fid.estimate.value
        assert similarity.difference.high < 0
        assert tables.verdict(similarity) == "worse"
        assert tables.verdict(fid) == "worse"
    assert lines["background_max", "grey"].estimate == Estimate(0, 0, 0)
    assert lines["background_max", "spot"].estimate.value == pytest.approx(9 / 8)
    assert any("8 pictures with 27-wide features" in note for note in notes)


def test_diversity_compares_what_differs_by_the_seed_alone(result_folder):
    def shade(level):
        def paint(picture, hole, place):
            shade = Image.new("RGB", picture.size, (level, level, level))
            return Image.composite(shade, picture, hole.point([0] + [255] * 255))

        return paint

    folders = []
    for name, level, seed, changes in (
        ("a", 10, 1, {}),
        ("b", 30, 2, {}),
        ("c", 90, 3, {}),
        ("again", 200, 3, {}),
        ("d", 10, 4, {"strength": 0.5}),
    ):
        run = {"workflow": "cat.json", "seed": seed, "changes": changes}
        folders.append(result_folder(name, shade(level), **run))
    found, lines, _ = measured(folders)
    (group,) = found.diversity
    assert group == "a and 2 more seeds"
    mean = pytest.approx((20 + 80 + 60) / 3)
    assert lines["diversity_pixels", group].estimate == Estimate(mean, mean, mean)
    assert lines["diversity_features", group].estimate.value > 0


def test_mismatched_folders_are_named(result_folder):
    whole = result_folder("whole")
    broken = result_folder("broken")
    ids = sorted(path.stem for path in broken.glob("*.png"))
    for id in ids[:6]:
        (broken / f"{id}.png").unlink()
    (broken / "stray.png").write_bytes((whole / f"{ids[0]}.png").read_bytes())
    with pytest.raises(EvaluationError) as error:
        measured([whole, broken])
    for words in (
        "broken lacks 6 of 8 pictures: ",
        *ids[:5],
        "and 1 more",
        "broken has 1 pictures that no record asks for: stray",
        "the 2 that all have with --common",
    ):
        assert words in str(error.value)
    assert "whole lacks" not in str(error.value)
    opened = [Results.open(whole), Results.open(broken)]
    samples = sample_set(whole)
    some, notes = samples.of_all(opened, True)
    assert [record.id for record in some.records] == ids[6:]
    assert notes == ["Only the 2 of 8 pictures that all folders have were evaluated."]
    (broken / f"{ids[6]}.png").unlink()
    with pytest.raises(
        EvaluationError,
        match=r"1 of 8 pictures of .*m.*jsonl .split test. to evaluate; .* at least 2",
    ):
        samples.of_all(opened, True)


def test_what_failed_in_one_folder_is_left_out_of_all(result_folder):
    whole = result_folder("whole")
    other = result_folder("other")
    ids = sorted(path.stem for path in other.glob("*.png"))
    (other / f"{ids[2]}.png").unlink()
    with open(other / "failed.jsonl", "w") as file:
        for id in (ids[2], ids[5]):  # the second was made after all
            file.write(json.dumps({"id": id, "reason": "empty mask", "detail": ""}) + "\n")
    found, _, notes = measured([whole, other])
    assert [record.id for record in found.samples.records] == ids[:2] + ids[3:]
    assert f"1 samples are left out, since they failed in {other}: {ids[2]}." in notes
    (other / "failed.jsonl").write_text("[]\n")
    with pytest.raises(
        EvaluationError, match=r"failed.jsonl cannot be read .*expected lines such as"
    ):
        measured([whole, other])


def test_files_that_cannot_be_used(result_folder, tmp_path):
    folder = result_folder()
    first = min(folder.glob("*.png"))
    picture(first, (32, 32))
    with pytest.raises(
        EvaluationError, match=rf"{first.name} is 32x32, expected 64x64. Give the --size"
    ):
        measured([folder])
    first.write_bytes(b"<html>404</html>")
    with pytest.raises(
        EvaluationError,
        match=rf"{first.name} cannot be decoded .*Delete it and let tools/generate.py",
    ):
        measured([folder])
    Image.effect_noise((SIZE, SIZE), 90).convert("RGB").save(first)
    cut(first, 0.6)  # its header is whole
    with pytest.raises(EvaluationError, match=rf"{first.name} cannot be decoded"):
        measured([folder])
    with pytest.raises(EvaluationError, match=r"none is not a folder, expected one with a PNG"):
        Results.open(tmp_path / "none")
    for content in ("{", "[1]"):
        (folder / "run.json").write_text(content)
        with pytest.raises(
            EvaluationError, match=r"run.json .*expected a JSON object. Delete it and give"
        ):
            Results.open(folder)


@pytest.mark.parametrize("ending", [".jpg", ".JPEG", ".webp", ".tif"])
def test_results_may_have_another_format(result_folder, ending):
    folder = result_folder(paint=grey)
    ids = sorted(path.stem for path in folder.glob("*.png"))
    pictures = {}
    for id in ids:
        path = folder / f"{id}.png"
        with Image.open(path) as file:
            pictures[id] = np.asarray(file).astype(int)
            file.save(path.with_suffix(ending), quality=100)
        path.unlink()
    results = Results.open(folder)
    samples, notes = sample_set(folder).of_all([results], False)
    assert [record.id for record in samples.records] == ids
    for id in ids:
        errors = np.abs(np.asarray(results.picture(id, SIZE)) - pictures[id])
        assert errors.mean() < (4 if ending != ".tif" else 1e-9)
    told = f"{folder} holds {ending} files instead of PNG: what their compression changed counts"
    assert sum(note.startswith(told) for note in notes) == len(notes) == (ending != ".tif")


def test_png_alone_counts_where_there_is_one(result_folder):
    folder = result_folder()
    lost = min(folder.glob("*.png"))
    lost.rename(lost.with_suffix(".jpg"))
    picture(folder / "sheet.jpg")
    with pytest.raises(EvaluationError, match=rf"lacks 1 of 8 pictures: {lost.stem}\. Let"):
        measured([folder])


def test_16_bit_results_are_not_white(result_folder):
    folder = result_folder()
    for path in folder.glob("*.png"):
        with Image.open(path) as file:
            levels = np.asarray(file.convert("L"))
        Image.fromarray(levels.astype(np.uint16) * 257).save(path)
    results = Results.open(folder)
    for id in results.ids:
        levels = np.asarray(results.picture(id, SIZE))
        assert 20 < levels.mean() < 235


def test_a_record_that_cannot_be_used(tmp_path):
    picture(tmp_path / "x.png")
    mask(tmp_path / "black.png", box=None)
    manifest.write(tmp_path / "m.jsonl", [manifest.Record("a", "x.png", "black.png", label="cup")])
    samples = SampleSet(tmp_path / "m.jsonl", None, "box", SIZE).read()
    with pytest.raises(
        EvaluationError, match=r"a of .*m.jsonl cannot be used: empty mask.*--common"
    ):
        samples.sample(samples.records[0])


def test_a_missing_library_leaves_fid_out(result_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    _, lines, notes = measured([result_folder()])
    assert {metric for metric, _ in lines} == {
        "kid",
        "object_similarity",
        "background_mean",
        "background_max",
        "background_psnr",
    }
    assert any(note.startswith("FID is left out: FID needs torchmetrics") for note in notes)
    _, lines, _ = measured([result_folder("other")], extractor=None)
    assert {metric for metric, _ in lines} == {
        "background_mean",
        "background_max",
        "background_psnr",
    }


# The table ----------------------------------------------------------------------------------------


def test_verdicts_follow_the_interval_and_the_metric():
    def verdict(metric, *difference):
        return tables.verdict(Line(metric, "x", 8, Estimate(1), Estimate(*difference)))

    assert verdict("fid", -2, -3, -1) == verdict("clip_score", 2, 1, 3) == "better"
    assert verdict("fid", 2, 1, 3) == verdict("clip_score", -2, -3, -1) == "worse"
    assert verdict("fid", -2, -5, 1) == verdict("fid", -2) == ""
    assert verdict("diversity_pixels", 2, 1, 3) == ""
    assert tables.verdict(Line("fid", "x", 8, Estimate(1))) == ""


def test_means_are_broken_down_by_name_and_by_size_of_hole(result_folder, monkeypatch):
    monkeypatch.setattr(breakdown, "LEAST", 2)
    folders = [result_folder("original"), result_folder("grey", grey)]
    found, _, _ = measured(folders)
    shares = []
    for sample in map(found.samples.sample, found.samples.records):
        shares.append((np.asarray(sample.hole) >= 128).mean())
    assert found.hole_shares == pytest.approx(shares)
    middle = float(np.median(shares))
    monkeypatch.setattr(breakdown, "SIZES", (middle,))
    values = np.array(found.folders[1].values["object_similarity"])
    small, large = breakdown.by_hole_size(found, 100, 0)
    assert small.title == f"0 % to {100 * middle:g} % of the picture"
    assert (small.count, large.count) == (4, 4)
    for part, chosen in ((small, np.array(shares) < middle), (large, np.array(shares) >= middle)):
        lines = {(line.metric, line.name): line for line in part.lines}
        line = lines["object_similarity", "grey"]
        assert line.estimate.value == pytest.approx(values[chosen].mean())
        assert line.difference.value == pytest.approx(values[chosen].mean() - 1, abs=1e-5)
        assert "fid" not in {metric for metric, _ in lines}
    lines = [Line("background_mean", name, 8, Estimate(1)) for name in found.names]
    page = report.page(found, lines, [], {}, None, 0, {"By hole": [small, large]})
    assert f"By hole: {small.title} <small>4 pictures</small>" in page
    assert page.count("<details>") == 2
    labels = [record.label for record in found.samples.records]
    parts = breakdown.by_label(found, 0, 0)
    frequent = {label for label in labels if labels.count(label) > 1}
    assert {part.title for part in parts} == frequent


def test_latex_is_escaped():
    lines = [Line("fid", "50_%&", 8, Estimate(1.5))]
    text = tables.latex(lines, ["50_%&"], {})
    assert r"50\_\%\& \\" in text
    assert r"FID $\downarrow$ & 1.5 \\" in text


# Memory -------------------------------------------------------------------------------------------

MEMORY = """
import sys
from pathlib import Path

import numpy as np
import torch
from cat_core.evaluation import measure, metrics
from cat_core.evaluation.results import Results, SampleSet

def pixels(pictures):
    levels = np.stack([np.asarray(picture.resize((20, 20))) for picture in pictures])
    return torch.from_numpy(levels).flatten(1).float()

def random_features(count):
    for _ in range(count):
        yield torch.rand(20, 128)

def peak():  # MB since the last call
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    return int(status["VmHWM"].split()[0]) / 1024

torch.set_num_threads(1)
samples = SampleSet(Path(sys.argv[1]), None, "box", 64).read()
results = Results.open(Path(sys.argv[2]))
peaks = []
for count in (100, 100, 2000):  # imports peak in the first
    found = measure.measure(samples.with_records(samples.records[:count]), [results], pixels)
    assert len(found.folders[0].values["background_mean"]) == found.real.whole.count == count
    metrics.frechet_distance(random_features(count), random_features(count))
    peaks.append(peak())
print(*peaks[1:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak")
def test_memory_does_not_grow_with_the_pictures(tmp_path):
    """2,000 pictures and results are 49 MB of pixels and 38 MB of features.

    40,000 features of the second kind are 20 MB.
    """
    Image.effect_noise((SIZE, SIZE), 90).convert("RGB").save(tmp_path / "x.png")
    (tmp_path / "results").mkdir()
    records = (
        manifest.Record(f"{i}", "x.png", box=(0.2, 0.2, 0.7, 0.8), label="cup") for i in range(2000)
    )
    manifest.write(tmp_path / "m.jsonl", records)
    for i in range(2000):
        os.link(tmp_path / "x.png", tmp_path / f"results/{i}.png")
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path / "m.jsonl", tmp_path / "results"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    few, many = map(float, run.stdout.split())
    print(f"peak {few:.0f} MB after 100 pictures, {many:.0f} MB after 2,000")
    assert many < few + 8
