"""tools/evaluate.py as a user runs it, and its report."""

import base64
import csv
import io
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import evaluate
import numpy as np
import open_clip
import pytest
import torch
from conftest import SIZE, grey, original, write_pictures, write_run
from paths import ROOT
from PIL import Image, ImageFilter

from cat_diffusion.cat_core.evaluation import study
from cat_diffusion.cat_core.evaluation.results import SampleSet
from cat_diffusion.cat_core.evaluation.study import StudyKey
from cat_diffusion.cat_core.pictures.tensors import channels_last
from cat_diffusion.nodes.visual_prompt import CATEncodeVisualPrompt, CATSemanticInpaint
from demo_model import score

DEMO_MODEL = ROOT / "models/cat_demo_model.safetensors"
DISTANCES = ("fid", "local_fid")  # without an interval of their own
METRICS = {
    *DISTANCES,
    "kid",
    "clip_score",
    "object_similarity",
    "background_mean",
    "background_max",
    "background_psnr",
    "feature_cosine",
}
SECTIONS = ["Cosine", "CLIP", "Best", "Worst", "Random", "b&lt;i&gt;lurred", "b&lt;i&gt;lurred"]


def blurred(picture, hole, place):
    return Image.composite(picture.filter(ImageFilter.GaussianBlur(1)), picture, hole)


class Page(HTMLParser):
    """What a browser would fetch and show."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.sources = []
        self.words = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "data"):
                self.sources.append(value)

    def handle_data(self, data):
        self.words.append(data)


@dataclass(frozen=True)
class Evaluated:
    """What one run on two folders made."""

    folder: Path
    screen: str
    found: dict  # of --json
    samples: SampleSet

    @property
    def grey(self):
        """The numbers of every picture in that folder."""
        return self.found["values"][(self.folder / "grey").as_posix()]

    @property
    def lines(self):
        """The table by metric and name."""
        return {(line["metric"], line["name"]): line for line in self.found["lines"]}


@pytest.fixture(scope="module")
def evaluated(scene_manifest, tiny_clip, tmp_path_factory):
    """One run on two folders, with everything that it writes."""
    folder = tmp_path_factory.mktemp("evaluated")
    samples = SampleSet(scene_manifest, "test", "box", SIZE).read()
    for name, paint in (("grey", grey), ("b<i>lurred", blurred)):
        (folder / name).mkdir()
        write_pictures(folder / name, samples, paint)
        write_run(folder / name, samples, workflow=name)
    command = [sys.executable, ROOT / "tools/evaluate.py"]
    command += [folder / "grey", folder / "b<i>lurred"]
    command += ["--clip-score", f"local-dir:{tiny_clip}", "--cosines", DEMO_MODEL]
    command += ["--json", folder / "new/m.json", "--csv", folder / "m.csv"]
    command += ["--html", folder / "report"]
    command += ["--markdown", folder / "m.md", "--latex", folder / "m.tex"]
    command += ["--resamples", "200", "--fid-resamples", "10", "--threads", "1", "--cpu"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    found = json.loads((folder / "new/m.json").read_text())
    return Evaluated(folder, run.stdout, found, samples)


def test_the_table_is_the_same_on_screen_in_json_and_in_csv(evaluated):
    rows = list(csv.DictReader(io.StringIO((evaluated.folder / "m.csv").read_text())))
    assert len(rows) == len(evaluated.lines) == 2 * 9
    assert {row["metric"] for row in rows} == METRICS
    for row, line in zip(rows, evaluated.found["lines"], strict=True):
        estimate = line["estimate"]
        assert row["metric"] == line["metric"]
        assert row["name"] == line["name"]
        assert float(row["value"]) == estimate["value"]
        assert (estimate["low"] is None) == (line["metric"] in DISTANCES)
        if estimate["low"] is not None:
            assert f"{estimate['value']:.4g} [{estimate['low']:.4g}, " in evaluated.screen
        assert (row["difference"] == "") == (line["difference"] is None)
    worse = evaluated.lines["object_similarity", "grey"]
    better = evaluated.lines["object_similarity", "b<i>lurred"]
    gap = better["estimate"]["value"] - worse["estimate"]["value"]
    assert better["difference"]["value"] == pytest.approx(gap)
    assert better["difference"]["low"] > 0
    assert evaluated.lines["fid", "b<i>lurred"]["difference"]["high"] < 0
    assert "demo model's CLIP, which knows drawn shapes only" in evaluated.screen


def test_folders_are_columns_in_markdown_and_latex(evaluated):
    text = (evaluated.folder / "m.md").read_text("utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert rows[0] == ["|", "grey", "b<i>lurred |"]
    first = {row[0].removeprefix("| "): row[1:] for row in rows[1:10]}
    score = evaluated.lines["clip_score", "b<i>lurred"]
    own, other = first["CLIP score (object and label) ↑"]
    grey_score = evaluated.lines["clip_score", "grey"]["estimate"]["value"]
    assert own.startswith(f"{grey_score:.4g} [")
    assert other.startswith(f"{score['estimate']['value']:.4g} [")
    assert f"; {score['difference']['value']:+.4g} [" in other
    assert first["FID ↓"][0] == f"{evaluated.lines['fid', 'grey']['estimate']['value']:.4g}"
    assert "- pictures: 8\n" in text

    tex = (evaluated.folder / "m.tex").read_text("utf-8")
    body = [line for line in tex.splitlines() if line.endswith(r"\\")]
    assert body[0] == r" & grey & b<i>lurred \\"
    assert all(len(re.findall(r"(?<!\\)&", line)) == 2 for line in body)
    assert r"FID $\downarrow$ & " in tex
    assert tex.count(r"\begin{tabular}{lcc}") == tex.count(r"\end{tabular}") >= 1


def square(hole):
    """The crop that the docstring of square_around_hole describes."""
    x0, y0, x1, y1 = hole.point(lambda value: 255 * (value >= 128)).getbbox()
    side = max(x1 - x0, y1 - y0)
    left = min(max(round((x0 + x1 - side) / 2), 0), SIZE - side)
    top = min(max(round((y0 + y1 - side) / 2), 0), SIZE - side)
    return left, top, left + side, top + side


def test_every_picture_keeps_its_numbers(evaluated, tiny_clip):
    """CLIP score by open_clip itself."""
    samples = evaluated.samples
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tiny_clip}")
    model.eval()
    assert evaluated.found["ids"] == [record.id for record in samples.records]
    assert set(map(len, evaluated.grey.values())) == {8}
    scores = []
    for record in samples.records:
        picture = Image.open(evaluated.folder / "grey" / f"{record.id}.png")
        crop = picture.crop(square(samples.sample(record).hole))
        with torch.no_grad():
            image = model.encode_image(preprocess(crop)[None], normalize=True)
            text = model.encode_text(open_clip.tokenize([record.label]), normalize=True)
        scores.append(100 * max(float((image * text).sum()), 0))
    assert evaluated.grey["clip_score"] == pytest.approx(scores, rel=1e-4, abs=1e-4)
    assert max(scores) > 1
    mean = evaluated.lines["clip_score", "grey"]["estimate"]["value"]
    assert mean == pytest.approx(sum(scores) / 8, rel=1e-4)


def test_the_cosines_are_those_of_the_nodes(evaluated):
    samples = evaluated.samples
    _, clip, _, vision, cat_model = score.load(DEMO_MODEL)
    means = {"observed": [], "predicted": []}
    for sample in map(samples.sample, samples.records):
        image = channels_last([sample.picture])
        hole = channels_last([sample.hole])
        with torch.inference_mode():
            prompt = CATSemanticInpaint.execute(
                cat_model, vision, clip, image, hole, sample.record.label
            ).args[0]
            truth = CATEncodeVisualPrompt.execute(vision, image).args[0].before
        inside = prompt.patch_mask.flatten(1).bool()
        for kind, patches in (("observed", prompt.before), ("predicted", prompt.after)):
            cosines = torch.cosine_similarity(patches, truth, dim=2)
            means[kind].append(cosines[inside].mean().item())
    for kind, values in means.items():
        line = evaluated.lines["feature_cosine", f"{kind}, {DEMO_MODEL.name}"]
        assert line["estimate"]["value"] == pytest.approx(np.mean(values), abs=1e-3)
    counts = evaluated.found["feature_cosines"]["counts"]
    assert sum(counts["observed"]) == sum(counts["predicted"]) > 8
    assert counts["observed"] != counts["predicted"]


@pytest.fixture(scope="module")
def report(evaluated):
    (path,) = (evaluated.folder / "report").iterdir()
    assert path.name == "index.html"
    return path.read_text(encoding="utf-8")


def test_the_report_is_one_file_with_everything_in_it(evaluated, report):
    page = Page(report)
    words = " ".join(page.words)
    assert page.sources
    for source in page.sources:
        assert source.startswith("data:image/jpeg;base64,")
    code = re.sub('"data:[^"]*"', "", report)
    for outside in ("http", "@import", "url("):
        assert outside not in code
    assert "script" not in page.tags
    assert "b<i>lurred" not in report  # escaped
    assert "b<i>lurred" in words
    assert page.tags.count("svg") == 2
    headings = re.findall("<h2>(.*?)</h2>", report)
    assert [heading.split(" ")[0] for heading in headings] == SECTIONS
    # Five sections, four samples, original, hole and two results.
    assert page.tags.count("img") == 5 * 4 * 4
    for line in evaluated.found["lines"]:
        assert f"{line['estimate']['value']:.4g}" in words


def test_the_report_shows_the_best_and_the_worst(evaluated, report):
    scores = dict(zip(evaluated.found["ids"], evaluated.grey["clip_score"], strict=True))
    sections = report.split("<h2>")
    best = re.findall(r"<small>(\d+)</small>", sections[3])
    worst = re.findall(r"<small>(\d+)</small>", sections[4])
    assert best == sorted(scores, key=scores.get, reverse=True)[:4]
    assert worst == sorted(scores, key=scores.get)[:4]

    shown = Image.open(io.BytesIO(base64.b64decode(Page(report).sources[0].split(",")[1])))
    records = {record.id: record for record in evaluated.samples.records}
    original = evaluated.samples.sample(records[best[0]]).picture
    difference = channels_last([shown.convert("L")]) - channels_last([original.convert("L")])
    assert shown.size == (SIZE, SIZE)
    assert difference.abs().mean() < 6 / 255  # JPEG


# Errors -------------------------------------------------------------------------------------------


@pytest.fixture
def evaluate_here(monkeypatch):
    """Run the tool in this process; returns its exit code."""

    def run(*arguments):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # the tool sets it; this takes it back
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments), "--cpu"])
        return evaluate.main()

    return run


@pytest.fixture
def fails(evaluate_here, capsys):
    """Run the tool in this process; returns what it says is wrong."""

    def run(*arguments):
        assert evaluate_here(*arguments) == 1
        return capsys.readouterr().err

    return run


def test_errors_end_without_a_traceback(fails, result_folder, tmp_path):
    folder = result_folder()
    boxes = result_folder("boxes", hole="box")
    none = tmp_path / "none"
    (tmp_path / "file").touch()
    unwritable = ["--json", tmp_path / "file/m.json", "--resamples", 0, "--fid-resamples", 0]
    for arguments, words in (
        ([boxes], f"--hole is {folder} segment, {boxes} box. Compare folders with the same hole"),
        (["--hole", "box"], "--hole box contradicts run.json (segment). Leave it out."),
        (["--size", 32], "--size 32 contradicts run.json (64)"),
        (["--split", "train"], "results has 8 pictures that no record asks for"),
        (["--manifest", f"{none}.jsonl"], "none.jsonl cannot be read"),
        (
            ["--extractor", "resnet"],
            "--extractor is 'resnet', expected inception:FILE or clip:FILE",
        ),
        (["--extractor", f"clip:{none}.safetensors"], "none.safetensors does not exist"),
        (["--clip-score", "ViT-B-32"], "--clip-score is 'ViT-B-32', expected MODEL:FILE"),
        (unwritable, "Cannot write"),
    ):
        assert words in fails(folder, *arguments)
    odd = {"manifest": "m.jsonl", "hole": "round", "size": "64"}
    (boxes / "run.json").write_text(json.dumps(odd))
    assert "hole is 'round' and size '64', expected segment, box, official-box and" in fails(boxes)
    (folder / "run.json").unlink()
    assert f"There is no manifest in {folder / 'run.json'}. Give --manifest." in fails(folder)


def test_the_documented_command_runs_as_written(result_folder, tmp_path):
    """Without Inception's file, and without open_clip's weights."""
    text = (ROOT / "docs/evaluation.md").read_text("utf-8")
    command, _ = re.search(r"^(python tools/evaluate\.py (.*\\\n)*.*)$", text, re.M).groups()
    assert "inception:" in command
    assert "--clip-score" in command
    (tmp_path / "results").mkdir()
    for name, paint in (("plain", grey), ("cat", original)):
        result_folder(f"results/{name}", paint)
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    python, *words = shlex.split(command.replace("\\\n", ""))
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "no_weights")}
    run = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert python == "python"
    assert run.returncode == 0, run.stderr
    left_out = "FID, Local FID and similarity are left out: weights-inception"
    for where in (run.stdout, run.stderr, (tmp_path / "report/index.html").read_text("utf-8")):
        assert left_out in where
        assert "CLIP score is left out: The weights openai" in where
    found = json.loads((tmp_path / "measured.json").read_text())
    assert {line["metric"] for line in found["lines"]} == {
        "background_mean",
        "background_max",
        "background_psnr",
    }
    assert (tmp_path / "measured.csv").is_file()


def test_the_documented_study_runs_as_written(result_folder, tmp_path):
    """With the ratings that a page would have saved."""
    text = (ROOT / "docs/evaluation.md").read_text("utf-8")
    make, table = re.findall(r"^(python tools/evaluate\.py .*(?:--study|--ratings).*)$", text, re.M)
    (tmp_path / "results").mkdir()
    for name, paint in (("plain", grey), ("cat", original)):
        result_folder(f"results/{name}", paint)
    (tmp_path / "tools").symlink_to(ROOT / "tools")

    def run(command):
        _, *words = shlex.split(command)
        return subprocess.run(
            [sys.executable, *words], cwd=tmp_path, capture_output=True, text=True
        )

    # Eight scenes are fewer than the thirty that are documented.
    assert "--pictures is 30, and there are 8. Give at most so many." in run(make).stderr
    made = run(make.replace("--pictures 30", "--pictures 8"))
    assert made.returncode == 0, made.stderr
    key = StudyKey.read(tmp_path / "study.key.json")
    for number, name in enumerate(("anna", "li")):
        ratings = []
        for picture in range(8):
            for question in study.QUESTIONS:
                for result, method in enumerate(key.orders[picture]):
                    value = min(5, 2 * method + (picture + number) % 3)
                    place = {"picture": picture, "result": result, "question": question}
                    ratings.append({**place, "value": value})
        content = {"format": study.FORMAT, "study": key.study, "ratings": ratings}
        (tmp_path / f"ratings_{name}.json").write_text(json.dumps(content))
    shown = run(table)
    assert shown.returncode == 0, shown.stderr
    assert "| coherence | cat | 16 | " in shown.stdout
    assert "Krippendorff's alpha, alignment: 0." in shown.stdout
    assert (tmp_path / "study.json").is_file()


def test_without_run_json_the_options_say_it_all(
    evaluate_here, result_folder, scene_manifest, capsys, tmp_path
):
    folder = result_folder(paint=grey)
    (folder / "run.json").unlink()
    options = ["--manifest", scene_manifest, "--hole", "segment", "--size", SIZE]
    options += ["--resamples", 0, "--fid-resamples", 0, "--json", tmp_path / "m.json"]
    assert evaluate_here(folder, *options) == 0
    found = json.loads((tmp_path / "m.json").read_text())
    assert found["facts"]["split"] == "all"
    assert all(line["estimate"]["low"] is None for line in found["lines"])
    assert "CLIP score is left out: it needs --clip-score MODEL:PRETRAINED." in found["notes"]
    assert "CLIP score is left out" in capsys.readouterr().out
    assert Path(found["facts"]["manifest"]) == scene_manifest
