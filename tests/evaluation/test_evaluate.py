"""tools/evaluate.py as a user runs it, and its report."""

import base64
import csv
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from conftest import SIZE, grey
from paths import ROOT
from PIL import Image, ImageFilter

DEMO_MODEL = ROOT / "models/cat_demo_model.safetensors"


def blurred(picture, hole, place):
    return Image.composite(picture.filter(ImageFilter.GaussianBlur(1)), picture, hole)


class Page(HTMLParser):
    """What a browser would fetch and show."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href", "data")]

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def evaluated(scene_manifest, tiny_clip, tmp_path_factory):
    """One run on two folders, with everything that it writes."""
    from cat_diffusion.cat_core.evaluation.results import SampleSet

    folder = tmp_path_factory.mktemp("evaluated")
    samples = SampleSet(scene_manifest, "test", "box", SIZE).read()
    for name, paint in (("grey", grey), ("b<i>lurred", blurred)):
        (folder / name).mkdir()
        for place, sample in enumerate(map(samples.sample, samples.records)):
            paint(sample.picture, sample.hole, place).save(
                folder / name / f"{sample.record.id}.png"
            )
        (folder / name / "run.json").write_text(
            json.dumps(
                {
                    "manifest": str(scene_manifest),
                    "split": "test",
                    "hole": "box",
                    "size": SIZE,
                    "workflow": name,
                    "seed": 0,
                }
            )
        )
    run = subprocess.run(
        [
            sys.executable,
            ROOT / "tools/evaluate.py",
            folder / "grey",
            folder / "b<i>lurred",
            "--clip-score",
            f"local-dir:{tiny_clip}",
            "--cosines",
            DEMO_MODEL,
            "--json",
            folder / "new/m.json",
            "--csv",
            folder / "m.csv",
            "--html",
            folder / "report",
            "--resamples",
            "200",
            "--fid-resamples",
            "10",
            "--threads",
            "1",
            "--cpu",
        ],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    return folder, run.stdout, json.loads((folder / "new/m.json").read_text()), samples


def test_the_table_is_the_same_on_screen_in_json_and_in_csv(evaluated):
    folder, screen, found, _ = evaluated
    rows = list(csv.DictReader(io.StringIO((folder / "m.csv").read_text())))
    assert len(rows) == len(found["lines"]) == 2 * 8
    assert {row["metric"] for row in rows} == {
        "fid",
        "local_fid",
        "clip_score",
        "object_similarity",
        "background_mean",
        "background_max",
        "background_psnr",
        "feature_cosine",
    }
    for row, line in zip(rows, found["lines"]):
        assert (row["metric"], row["name"], float(row["value"])) == (
            line["metric"],
            line["name"],
            line["estimate"]["value"],
        )
        assert f"{line['estimate']['value']:.4g} [{line['estimate']['low']:.4g}, " in screen
        assert (row["difference"] == "") == (line["difference"] is None)
    by_name = {(line["metric"], line["name"]): line for line in found["lines"]}
    better = by_name["object_similarity", "b<i>lurred"]
    gap = better["estimate"]["value"] - by_name["object_similarity", "grey"]["estimate"]["value"]
    assert better["difference"]["value"] == pytest.approx(gap) and better["difference"]["low"] > 0
    assert by_name["fid", "b<i>lurred"]["difference"]["high"] < 0
    assert "demo model's CLIP, which knows drawn shapes only" in screen


def test_every_picture_keeps_its_numbers(evaluated, tiny_clip):
    """CLIP score by open_clip itself on the crop that the docstring describes."""
    import open_clip

    folder, _, found, samples = evaluated
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tiny_clip}")
    model.eval()
    values = found["values"][(folder / "grey").as_posix()]
    assert found["ids"] == [record.id for record in samples.records] and {
        len(column) for column in values.values()
    } == {8}
    scores = []
    for record in samples.records:
        x0, y0, x1, y1 = (
            samples.sample(record).hole.point(lambda value: 255 * (value >= 128)).getbbox()
        )
        side = max(x1 - x0, y1 - y0)
        left, top = (
            min(max(round((a + b - side) / 2), 0), SIZE - side) for a, b in ((x0, x1), (y0, y1))
        )
        crop = Image.open(folder / "grey" / f"{record.id}.png").crop(
            (left, top, left + side, top + side)
        )
        with torch.no_grad():
            image = model.encode_image(preprocess(crop)[None], normalize=True)
            text = model.encode_text(open_clip.tokenize([record.label]), normalize=True)
        scores.append(100 * max(float((image * text).sum()), 0))
    assert values["clip_score"] == pytest.approx(scores, rel=1e-4, abs=1e-4) and max(scores) > 1
    mean = next(
        line for line in found["lines"] if (line["metric"], line["name"]) == ("clip_score", "grey")
    )
    assert mean["estimate"]["value"] == pytest.approx(sum(scores) / 8, rel=1e-4)


def test_the_cosines_are_those_of_the_nodes(evaluated, pack):
    import numpy as np

    from cat_diffusion.nodes.visual_prompt import CATEncodeVisualPrompt, CATSemanticInpaint
    from demo_model import score

    _, _, found, samples = evaluated
    _, clip, _, vision, cat_model = score.load(DEMO_MODEL)
    means = {"observed": [], "predicted": []}
    for sample in map(samples.sample, samples.records):
        image, hole = (
            torch.from_numpy(np.array(x, np.float32) / 255)[None]
            for x in (sample.picture, sample.hole)
        )
        with torch.inference_mode():
            prompt = CATSemanticInpaint.execute(
                cat_model, vision, clip, image, hole, sample.record.label
            ).args[0]
            truth = CATEncodeVisualPrompt.execute(vision, image).args[0].before
        inside = prompt.patch_mask.flatten(1).bool()
        for kind, patches in (("observed", prompt.before), ("predicted", prompt.after)):
            means[kind].append(torch.cosine_similarity(patches, truth, dim=2)[inside].mean().item())
    lines = {
        line["name"].split(",")[0]: line
        for line in found["lines"]
        if line["metric"] == "feature_cosine"
    }
    for kind, values in means.items():
        assert lines[kind]["estimate"]["value"] == pytest.approx(np.mean(values), abs=1e-3)
    counts = found["feature_cosines"]["counts"]
    assert (
        sum(counts["observed"]) == sum(counts["predicted"]) > 8
        and counts["observed"] != counts["predicted"]
    )


def test_the_report_is_one_file_with_everything_in_it(evaluated):
    folder, _, found, samples = evaluated
    assert [path.name for path in (folder / "report").iterdir()] == ["index.html"]
    text = (folder / "report/index.html").read_text(encoding="utf-8")
    page, words = Page(text), " ".join(Page(text).words)
    assert page.sources and all(
        source.startswith("data:image/jpeg;base64,") for source in page.sources
    )
    code = re.sub('"data:[^"]*"', "", text)
    assert (
        "http" not in code
        and "@import" not in code
        and "url(" not in code
        and "script" not in page.tags
    )
    assert "b<i>lurred" not in text and "b<i>lurred" in words  # escaped
    assert page.tags.count("svg") == 2
    sections = re.findall("<h2>(.*?)</h2>", text)
    assert [section.split(" ")[0] for section in sections] == [
        "Cosine",
        "CLIP",
        "Best",
        "Worst",
        "Random",
        "b&lt;i&gt;lurred",
        "b&lt;i&gt;lurred",
    ]
    assert (
        page.tags.count("img") == 5 * 4 * 4
    )  # five sections, four samples, original, hole and two results
    for line in found["lines"]:
        assert f"{line['estimate']['value']:.4g}" in words
    scores = dict(zip(found["ids"], found["values"][(folder / "grey").as_posix()]["clip_score"]))
    best, worst = (
        re.findall(r"<small>(\d+)</small>", text.split("<h2>")[section]) for section in (3, 4)
    )
    assert (
        best == sorted(scores, key=scores.get, reverse=True)[:4]
        and worst == sorted(scores, key=scores.get)[:4]
    )
    shown = Image.open(io.BytesIO(base64.b64decode(page.sources[0].split(",")[1])))
    original = next(
        samples.sample(record).picture for record in samples.records if record.id == best[0]
    )
    difference = torch.tensor(list(shown.convert("L").tobytes())).float() - torch.tensor(
        list(original.convert("L").tobytes())
    )
    assert shown.size == (SIZE, SIZE) and difference.abs().mean() < 6  # JPEG


# Errors -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fails(pack, monkeypatch, capsys):
    """Run the tool in this process; returns what it says is wrong."""

    def run(*arguments):
        import evaluate

        monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # the tool sets it; this takes it back
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments), "--cpu"])
        assert evaluate.main() == 1
        return capsys.readouterr().err

    return run


def test_errors_end_without_a_traceback(fails, result_folder, tmp_path):
    folder, boxes = result_folder(), result_folder("boxes", hole="box")
    assert f"--hole is {folder} segment, {boxes} box. Compare folders with the same hole" in fails(
        folder, boxes
    )
    assert "--hole box contradicts run.json (segment). Leave it out." in fails(
        folder, "--hole", "box"
    )
    assert "--size 32 contradicts run.json (64)" in fails(folder, "--size", 32)
    assert "results has 8 pictures that no record asks for" in fails(folder, "--split", "train")
    assert "none.jsonl cannot be read" in fails(folder, "--manifest", tmp_path / "none.jsonl")
    assert "--extractor is 'resnet', expected inception:FILE or clip:FILE" in fails(
        folder, "--extractor", "resnet"
    )
    assert "none.pth is not a file, expected torch-fidelity's" in fails(
        folder, "--extractor", f"inception:{tmp_path}/none.pth"
    )
    assert "none.safetensors does not exist" in fails(
        folder, "--extractor", f"clip:{tmp_path}/none.safetensors"
    )
    assert "--clip-score is 'ViT-B-32', expected MODEL:FILE" in fails(
        folder, "--clip-score", "ViT-B-32"
    )
    (tmp_path / "file").touch()
    assert "Cannot write" in fails(
        folder, "--json", tmp_path / "file/m.json", "--resamples", 0, "--fid-resamples", 0
    )
    (boxes / "run.json").write_text(
        json.dumps({"manifest": "m.jsonl", "hole": "round", "size": "64"})
    )
    assert "hole is 'round' and size '64', expected segment or box" in fails(boxes)
    (folder / "run.json").unlink()
    assert f"There is no manifest in {folder / 'run.json'}. Give --manifest." in fails(folder)


def test_without_run_json_the_options_say_it_all(
    pack, result_folder, scene_manifest, monkeypatch, capsys, tmp_path
):
    import evaluate

    folder = result_folder(paint=grey)
    (folder / "run.json").unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "evaluate.py",
            str(folder),
            "--manifest",
            str(scene_manifest),
            "--hole",
            "segment",
            "--size",
            str(SIZE),
            "--resamples",
            "0",
            "--fid-resamples",
            "0",
            "--cpu",
            "--json",
            str(tmp_path / "m.json"),
        ],
    )
    assert evaluate.main() == 0
    found = json.loads((tmp_path / "m.json").read_text())
    assert found["facts"]["split"] == "all" and all(
        line["estimate"]["low"] is None for line in found["lines"]
    )
    assert "CLIP score is left out: it needs --clip-score MODEL:PRETRAINED." in found["notes"]
    assert "CLIP score is left out" in capsys.readouterr().out
    assert Path(found["facts"]["manifest"]) == scene_manifest
