"""tools/generate.py against real servers: what it writes, and what it survives."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import folder_paths
import numpy as np
import pytest
from paths import ROOT
from PIL import Image

from cat_diffusion.cat_core.data import manifest, masks
from comfyui.local_server import LocalServer, make_base
from comfyui.remote_server import Workflow, WorkflowError
from nodes import LoadImageMask

BASELINES = ROOT / "workflows/baselines"
SIZE = 64


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A manifest of twelve good records, and some that cannot be used."""
    folder = tmp_path_factory.mktemp("data")
    records = []
    for i in range(12):
        noise = np.random.default_rng(i).integers(0, 255, (50, 70, 3), np.uint8)
        picture = Image.fromarray(noise).resize((90, 70), Image.Resampling.BICUBIC)
        picture.save(folder / f"{i}.png")
        mask = np.zeros((70, 90), np.uint8)
        mask[20:50, 25 + i : 60] = np.tri(30, 35 - i, 10) * 255
        Image.fromarray(mask).save(folder / f"{i}_mask.png")
        files = {"image": f"{i}.png", "mask": f"{i}_mask.png"}
        records.append({"id": f"scene {i}", "label": f"cup {i % 3}", **files})
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:500])
    good = {"image": "0.png", "box": [0, 0, 1, 1], "label": "x"}
    unusable = [
        {"id": "broken", **good, "image": "broken.png"},
        {"id": "gone", **good, "image": "none.png"},
        {"id": "whole", "image": "0.png", "caption": "x"},
        {"id": "tiny", **good, "box": [0, 0, 0.001, 0.001]},
    ]
    for id in ("../escaped", "a/b", "Run", "a" * 300, "\ud800"):
        unusable.append({"id": id, **good})
    records[3:3] = unusable
    records.append({"id": "other", **good, "split": "train"})
    return write_manifest(folder / "manifest.jsonl", records)


def write_manifest(path, records):
    with open(path, "w") as file:
        for record in records:
            file.write(json.dumps({"split": "test", **record}) + "\n")
    return path


@pytest.fixture(scope="module")
def workflow(tmp_path_factory):
    """cat.json on the tiny checkpoint, with few steps."""
    return tiny_workflow(tmp_path_factory.mktemp("workflow"), "cat")


def tiny_workflow(folder, name):
    """A baseline whose models are tiny; everything behind the loader is as shipped."""
    nodes = json.loads((BASELINES / f"{name}.json").read_text())
    loader = nodes["1"]
    if loader["class_type"] == "CheckpointLoaderSimple":  # it knows no SD 1.5 smaller than SD 1.5
        four_channels = name != "sd_inpainting"
        nodes["1"] = {**loader, "class_type": "CATLoadCheckpoint", "inputs": {"checkpoint": "x"}}
        nodes["model"] = {"class_type": "HelperModel", "inputs": {"kind": "sd15"}}
        for node in nodes.values():
            if four_channels and node["inputs"].get("model") == ["1", 0]:
                node["inputs"]["model"] = ["model", 0]
    nodes["1"]["inputs"]["checkpoint"] = "tiny.safetensors"
    for node in nodes.values():
        if node["class_type"] == "CATScheduler":
            node["inputs"]["steps"] = 10 if node["inputs"]["denoise"] == 1 else 8
    (folder / f"{name}.json").write_text(json.dumps(nodes))
    return folder / f"{name}.json"


@pytest.fixture(scope="module")
def second(base, tmp_path_factory):
    """Another server with folders of its own, not started."""
    folder = tmp_path_factory.mktemp("second")
    make_base(folder)
    shutil.copy(base / "models/cat_diffusion/tiny.safetensors", folder / "models/cat_diffusion")
    return LocalServer(folder, "--cpu")


def command(workflow, data, out, *arguments, servers):
    words = [sys.executable, ROOT / "tools/generate.py", workflow, "--manifest", data]
    words += ["--size", str(SIZE), "--hole", "box", "--out", out]
    return [*words, "--server", *servers, *arguments]


def start(*arguments, servers):
    words = command(*arguments, servers=servers)
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(run, code=0):
    """(what it printed, what it complained about)."""
    out, error = run.communicate(timeout=300)
    print(out, error)
    assert run.returncode == code
    assert "Traceback" not in error
    return out, error


def until(condition, run):
    end = time.monotonic() + 300
    while not condition():
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def results(out):
    about = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    about.pop("run", None)
    return about


def without_server(about):
    """What does not depend on where and when samples were made."""
    return {name: {**facts, "server": 0, "seconds": 0} for name, facts in about.items()}


def inputs(server):
    """Names of the files that were uploaded to a server."""
    return {path.name for path in (server.base / "input/generate").iterdir()}


def failures(out):
    """Why samples have no result, by id."""
    reasons = {}
    for line in (out / "failed.jsonl").read_text().splitlines():
        failure = json.loads(line)
        reasons[failure["id"]] = failure["reason"]
    return reasons


def pictures(out):
    return {path.name: path.read_bytes() for path in out.glob("*.png")}


def test_a_server_that_dies_and_a_run_that_is_killed_lose_nothing(
    server, second, workflow, data, tmp_path
):
    out = tmp_path / "out"
    again = tmp_path / "again"
    with second:
        run = start(workflow, data, out, servers=[server.url, second.url])
        until(lambda: any(made["server"] == second.url for made in results(out).values()), run)
        os.kill(second.process.pid, signal.SIGKILL)
        printed, complained = finish(run)
    assert f"{second.url}: it does not answer" in complained
    assert "21 samples: 12 kept, 9 skipped" in printed
    assert "unusable id: 5" in printed
    for url in (server.url, second.url):
        pace = re.search(rf"{url}: (\d+) pictures, [\d.]+ s each, idle ([\d.]+) %", printed)
        assert 0 < int(pace[1]) <= 12
        assert 0 <= float(pace[2]) < 100
    assert "no hole: 1 (whole)" in printed
    assert "corrupt image: 1 (broken)" in printed
    reasons = failures(out)
    assert len(reasons) == 9
    assert reasons["tiny"] == "empty mask"
    assert reasons["../escaped"] == "unusable id"
    made = results(out)
    assert made.keys() == {f"scene {i}" for i in range(12)}
    assert {about["server"] for about in made.values()} == {server.url, second.url}
    assert len({about["seed"] for about in made.values()}) == 12
    assert {path.suffix for path in out.iterdir()} == {".png", ".json", ".jsonl"}
    assert not (tmp_path / "escaped.png").exists()

    # Servers may share their folders.
    assert inputs(server)
    assert inputs(second)
    assert inputs(server).isdisjoint(inputs(second))

    # The same samples once more by the other server, which is started only when the run waits for
    # it; the run is killed.
    run = start(workflow, data, again, servers=[second.url])
    with second:
        until(lambda: len(results(again)) >= 4, run)
        run.kill()
        run.communicate()
        before = results(again)
        assert 4 <= len(before) < 12
        cut, altered, others = sorted(before)[:3]
        (again / f"{cut}.png").write_bytes((again / f"{cut}.png").read_bytes()[:2000])
        content = bytearray((again / f"{altered}.png").read_bytes())
        content[3000] ^= 1
        (again / f"{altered}.png").write_bytes(content)
        (again / f"{others}.json").write_text(json.dumps(before[others] | {"seed": 1}))
        finish(start(workflow, data, again, servers=[second.url]))
    after = results(again)
    assert pictures(again) == pictures(out)
    assert without_server(after) == without_server(made)
    for name, about in before.items():
        assert (after[name] == about) == (name not in (cut, altered, others))

    about = after["scene 0"]
    run = json.loads((again / "run.json").read_text())
    common = {"hole": "box", "size": SIZE, "workflow": "cat.json"}
    assert about == about | {"id": "scene 0", "label": "cup 0", **common}
    assert about["seconds"] > 0
    assert about["workflow_sha256"] == run["workflow_sha256"]
    assert run == run | {"manifest": str(data), "split": "test", "seed": 0, **common}


@pytest.mark.parametrize("name", sorted(path.stem for path in BASELINES.glob("*.json")))
def test_a_baseline_changes_the_hole_and_nothing_else(server, data, tmp_path, name):
    few = data.with_name(f"{name}.jsonl")
    few.write_text(data.read_text().splitlines()[0])
    workflow = tiny_workflow(tmp_path, name)
    out = tmp_path / "out"
    finish(start(workflow, few, out, "--hole", "segment", servers=[server.url]))
    made = np.asarray(Image.open(out / "scene 0.png")).astype(int)
    photo, mask = masks.load(manifest.read(few)[0], few.parent)
    original = levels(photo)
    hole = levels(masks.training_mask(mask, "segment"))
    assert (made[hole == 0] == original[hole == 0]).all()
    assert np.abs(made - original)[hole == 255].mean() > 5
    assert 50 < (hole == 255).sum() < SIZE * SIZE / 3


def test_the_official_box_and_a_sample_of_the_posterior(server, data, workflow, tmp_path):
    few = data.with_name("official.jsonl")
    record = json.loads(data.read_text().splitlines()[0]) | {"box": [0.25, 0.25, 0.5, 0.75]}
    boxless = {**record, "id": "boxless"}
    boxless.pop("box")
    write_manifest(few, [record, boxless])
    made = {}
    for posterior in ("mode", "sample"):
        out = tmp_path / posterior
        options = ["--hole", "official-box", "--posterior", posterior]
        finish(start(workflow, few, out, *options, servers=[server.url]))
        assert failures(out) == {"boxless": "no box"}
        made[posterior] = np.asarray(Image.open(out / "scene 0.png")).astype(int)
        run = json.loads((out / "run.json").read_text())
        assert (run["hole"], run["posterior"]) == ("official-box", posterior)
    changed = made["sample"] != made["mode"]
    columns, rows = changed.any((0, 2)).nonzero()[0], changed.any((1, 2)).nonzero()[0]
    # Pixels 128 to 256 and 128 to 384 of 512; bicubic reaches one pixel of 64 further.
    assert (columns[0], columns[-1], rows[0], rows[-1]) == pytest.approx((15, 33, 15, 49), abs=1)


def test_a_posterior_needs_the_node_that_samples_it():
    workflow = Workflow(BASELINES / "cat.json")
    before = workflow.sha256
    workflow.sample_posterior()
    assert workflow.sha256 != before
    nodes = workflow.prompt(photo="p", mask="m", label="spoon", seed=7).values()
    (node,) = [node for node in nodes if node["class_type"] == "CATInpaintConditioning"]
    assert node["inputs"]["posterior"] == "sample"
    assert node["inputs"]["posterior_seed"] == 7
    with pytest.raises(WorkflowError, match=r"has no node of CATInpaint.*leave --posterior out"):
        Workflow(BASELINES / "sd_inpainting.json").sample_posterior()


def test_the_host_reads_the_levels_of_a_sent_mask(
    server, base, data, workflow, tmp_path, monkeypatch
):
    few = data.with_name("sent.jsonl")
    few.write_text(data.read_text().splitlines()[0])
    finish(start(workflow, few, tmp_path / "out", servers=[server.url]))
    newest = max((base / "input").rglob("*_mask.png"), key=lambda path: path.stat().st_mtime)
    monkeypatch.setattr(folder_paths, "input_directory", str(newest.parent))
    node = LoadImageMask()
    mask, *_ = getattr(node, node.FUNCTION)(image=newest.name, channel="red")
    sent = np.asarray(Image.open(newest).convert("L"))
    assert (sent.min(), sent.max()) == (0, 255)
    assert np.abs(mask[0].numpy() * 255 - sent).max() < 1e-3


def levels(picture):
    return np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).astype(int)


def test_nobody_answers(workflow, data, tmp_path):
    run = start(workflow, data, tmp_path / "out", "--patience", "2", servers=["http://127.0.0.1:9"])
    _, error = finish(run, 1)
    silent = re.search(r"No server has answered for (\d+) s", error)
    assert int(silent[1]) >= 2
    assert "the same command again" in error


def test_a_prompt_that_fails_is_named_and_a_prompt_that_is_refused_stops_the_run(
    server, workflow, data, tmp_path
):
    out = tmp_path / "out"
    out.mkdir()
    (out / "scene 0.png").touch()
    servers = [server.url]
    change = ["--set", "Checkpoint.checkpoint=nan.safetensors"]
    printed, _ = finish(start(workflow, data, out, *change, servers=servers), 1)
    assert "21 samples: 0 kept, 21 skipped" in printed
    assert "error in CATLoadCheckpoint: 12" in printed
    assert "NaN or Inf" in (out / "failed.jsonl").read_text()
    assert not pictures(out)
    # Without --set it is another run.
    _, error = finish(start(workflow, data, out, servers=servers), 1)
    assert "holds a run with workflow_sha256" in error
    assert "Choose another --out" in error
    change = ["--set", "Checkpoint.checkpoint=none"]
    _, error = finish(start(workflow, data, tmp_path / "none", *change, servers=servers), 1)
    assert "refuses /prompt (400)" in error
    assert "CATLoadCheckpoint" in error
    assert "There is no none in" in error


def test_memory_does_not_grow_with_the_manifest(workflow, tmp_path):
    """Of 20,000 records whose pictures are missing; those that are made take the same way."""
    peaks = []
    for count in (100, 20_000):
        missing = {"image": "none.jpg", "box": [0, 0, 1, 1], "label": "x"}
        records = ({"id": f"{i:012}", **missing} for i in range(count))
        data = write_manifest(tmp_path / f"{count}.jsonl", records)
        out = tmp_path / str(count)
        run = start(workflow, data, out, servers=["http://127.0.0.1:9"])
        with run.stdout, run.stderr:
            peaks.append(os.wait4(run.pid, 0)[2].ru_maxrss / 1024)
            assert f"missing image: {count:,}" in run.stdout.read()
        assert len((out / "failed.jsonl").read_text().splitlines()) == count
    print(peaks)
    assert peaks[1] < 1.15 * peaks[0]  # the ids seen so far take 2 MB of about 100


def change(nodes, title, **inputs):
    for node in nodes.values():
        if node.get("_meta", {}).get("title") == title:
            node["inputs"].update(inputs)


@pytest.mark.parametrize(
    "alter, words",
    [
        (lambda nodes: nodes.pop("2"), ('titled "Photo": none', "expected LoadImage")),
        (
            lambda nodes: nodes["3"].update(class_type="LoadImage"),
            ('titled "Mask": LoadImage;', "expected LoadImageMask"),
        ),
        (lambda nodes: nodes["4"].pop("_meta"), ('titled "Label": none', "one with a text")),
        (
            lambda nodes: change(nodes, "Label", value=["5", 0]),
            ('titled "Label" has no text of its own',),
        ),
        (
            lambda nodes: change(nodes, "Sampler", noise_seed=["9", 0]),
            ("a seed that comes from another node",),
        ),
        (lambda nodes: nodes["13"]["inputs"].pop("noise_seed"), ("has no seed",)),
        (
            lambda nodes: nodes.update(x={"class_type": "SaveImage", "inputs": {}}),
            ("has 2 nodes of SaveImage or PreviewImage",),
        ),
        (
            lambda nodes: nodes.update(nodes=[], links=[]),
            ("workflow for the canvas", "Export (API)"),
        ),
        (lambda nodes: nodes["5"].pop("class_type"), ("no workflow in API format",)),
    ],
)
def test_a_workflow_that_cannot_be_used_is_explained(tmp_path, alter, words):
    nodes = json.loads((BASELINES / "cat.json").read_text())
    alter(nodes)
    (tmp_path / "w.json").write_text(json.dumps(nodes))
    with pytest.raises(WorkflowError) as error:
        Workflow(tmp_path / "w.json")
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    "text, words",
    [
        ("Nobody.x=1", 'no node titled "Nobody"; its titles are Checkpoint, '),
        ("Sampler.x=1", "no value x to change; it has add_noise, noise_seed, cfg"),
        ("Sampler.model=1", "no value model"),
        ("Sampler.cfg=high", "a value like 7.5"),
        ("cfg=3", "expected TITLE.input=value"),
    ],
)
def test_a_change_that_fits_nothing_is_explained(text, words):
    with pytest.raises(WorkflowError) as error:
        Workflow(BASELINES / "cat.json", [text])
    assert words in str(error.value), error.value


def test_changes_are_part_of_what_a_result_was_made_with():
    plain = Workflow(BASELINES / "cat.json")
    changed = Workflow(BASELINES / "cat.json", ["Sampler.cfg=3", "Label.value=a=b.c"])
    assert plain.sha256 != changed.sha256
    assert changed.nodes["13"]["inputs"]["cfg"] == 3
    assert changed.nodes["4"]["inputs"]["value"] == "a=b.c"
    prompt = changed.prompt(photo="p", mask="m", label="spoon", seed=7)
    assert prompt["2"]["inputs"]["image"] == "p"
    assert prompt["3"]["inputs"]["image"] == "m"
    assert prompt["4"]["inputs"]["value"] == "spoon"
    assert prompt["13"]["inputs"]["noise_seed"] == 7


def test_unusable_arguments_are_explained(workflow, data, tmp_path):
    for arguments, words in (
        (["--size", "100"], "multiple of 8"),
        (["--server", "127.0.0.1"], "http://127.0.0.1:8188"),
        (["--split", "dev"], "expected train, validation or test"),
        (["--out", "/dev/null/x"], "Cannot write"),
        (["--split", "validation"], "no record of split"),
        (["--manifest", "none"], "cannot be read"),
    ):
        words_given = command(
            workflow, data, tmp_path / "x", *arguments, servers=["http://127.0.0.1:9"]
        )
        run = subprocess.run(words_given, capture_output=True, text=True)
        assert run.returncode in (1, 2)
        assert words in run.stderr
        assert "Traceback" not in run.stderr
