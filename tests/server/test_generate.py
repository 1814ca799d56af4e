"""tools/generate.py against real servers: what it writes, and what it survives."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from paths import ROOT
from PIL import Image

from comfyui.remote_server import Workflow, WorkflowError

BASELINES = ROOT / "workflows/baselines"
SIZE = 64


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A manifest of twelve good records, and some that cannot be used."""
    folder = tmp_path_factory.mktemp("data")
    records = []
    for i in range(12):
        picture = np.random.default_rng(i).integers(0, 255, (50, 70, 3), np.uint8)
        Image.fromarray(picture).resize((90, 70), Image.Resampling.BICUBIC).save(
            folder / f"{i}.png"
        )
        mask = np.zeros((70, 90), np.uint8)
        mask[20:50, 25 + i : 60] = np.tri(30, 35 - i, 10) * 255
        Image.fromarray(mask).save(folder / f"{i}_mask.png")
        records.append(
            {
                "id": f"scene {i}",
                "image": f"{i}.png",
                "mask": f"{i}_mask.png",
                "label": f"cup {i % 3}",
            }
        )
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:500])
    good = {"image": "0.png", "box": [0, 0, 1, 1], "label": "x"}
    records[3:3] = [
        {"id": "broken", **good, "image": "broken.png"},
        {"id": "gone", **good, "image": "none.png"},
        {"id": "whole", "image": "0.png", "caption": "x"},
        {"id": "tiny", **good, "box": [0, 0, 0.001, 0.001]},
        *({"id": id, **good} for id in ("../escaped", "a/b", "Run", "a" * 300, "\ud800")),
    ]
    return write_manifest(
        folder / "manifest.jsonl", records + [{"id": "other", **good, "split": "train"}]
    )


def write_manifest(path, records):
    path.write_text("".join(json.dumps({"split": "test", **record}) + "\n" for record in records))
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
    from comfyui.local_server import LocalServer, make_base

    folder = tmp_path_factory.mktemp("second")
    make_base(folder)
    shutil.copy(base / "models/cat_diffusion/tiny.safetensors", folder / "models/cat_diffusion")
    return LocalServer(folder, "--cpu")


def start(workflow, data, out, *arguments, servers):
    command = [
        sys.executable,
        ROOT / "tools/generate.py",
        workflow,
        "--manifest",
        data,
        "--size",
        str(SIZE),
        "--hole",
        "box",
        "--out",
        out,
        "--server",
        *servers,
        *arguments,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(run, code=0):
    """(what it printed, what it complained about)."""
    out, error = run.communicate(timeout=300)
    print(out, error)
    assert run.returncode == code and "Traceback" not in error
    return out, error


def until(condition, run):
    end = time.monotonic() + 300
    while not condition():
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def results(out):
    return {
        path.stem: json.loads(path.read_text()) for path in out.glob("*.json") if path.stem != "run"
    }


def pictures(out):
    return {path.name: path.read_bytes() for path in out.glob("*.png")}


def test_a_server_that_dies_and_a_run_that_is_killed_lose_nothing(
    server, second, workflow, data, tmp_path
):
    out, again = tmp_path / "out", tmp_path / "again"
    with second:
        run = start(workflow, data, out, servers=[server.url, second.url])
        until(lambda: any(made["server"] == second.url for made in results(out).values()), run)
        os.kill(second.process.pid, signal.SIGKILL)
        printed, complained = finish(run)
    assert (
        f"{second.url}: it does not answer" in complained
        and "21 samples: 12 kept, 9 skipped" in printed
    )
    assert (
        "unusable id: 5" in printed
        and "no hole: 1 (whole)" in printed
        and "corrupt image: 1 (broken)" in printed
    )
    reasons = {
        line["id"]: line["reason"]
        for line in map(json.loads, (out / "failed.jsonl").read_text().splitlines())
    }
    assert (
        len(reasons) == 9
        and reasons["tiny"] == "empty mask"
        and reasons["../escaped"] == "unusable id"
    )
    made = results(out)
    assert made.keys() == {f"scene {i}" for i in range(12)}
    assert {about["server"] for about in made.values()} == {server.url, second.url}
    assert len({about["seed"] for about in made.values()}) == 12
    assert {path.suffix for path in out.iterdir()} == {".png", ".json", ".jsonl"} and not (
        tmp_path / "escaped.png"
    ).exists()

    inputs = [
        {path.name for path in (one.base / "input/generate").iterdir()} for one in (server, second)
    ]
    assert all(inputs) and not inputs[0] & inputs[1]  # servers may share their folders

    # The same samples once more by the other server, which is started only when the run waits for it; the run is killed.
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
    assert {name: {**about, "server": 0, "seconds": 0} for name, about in after.items()} == {
        name: {**about, "server": 0, "seconds": 0} for name, about in made.items()
    }
    assert all(
        (after[name] == about) == (name not in (cut, altered, others))
        for name, about in before.items()
    )

    about, run = after["scene 0"], json.loads((again / "run.json").read_text())
    assert about == about | {
        "id": "scene 0",
        "label": "cup 0",
        "hole": "box",
        "size": SIZE,
        "workflow": "cat.json",
    }
    assert about["seconds"] > 0 and about["workflow_sha256"] == run["workflow_sha256"]
    assert run == run | {
        "manifest": str(data),
        "split": "test",
        "hole": "box",
        "size": SIZE,
        "seed": 0,
        "workflow": "cat.json",
    }


@pytest.mark.parametrize("name", sorted(path.stem for path in BASELINES.glob("*.json")))
def test_a_baseline_changes_the_hole_and_nothing_else(server, data, tmp_path, name):
    from cat_diffusion.cat_core.data import manifest, masks

    few = data.with_name(f"{name}.jsonl")
    few.write_text(data.read_text().splitlines()[0])
    finish(
        start(
            tiny_workflow(tmp_path, name),
            few,
            tmp_path / "out",
            "--hole",
            "segment",
            servers=[server.url],
        )
    )
    made = np.asarray(Image.open(tmp_path / "out/scene 0.png")).astype(int)
    photo, mask = masks.load(manifest.read(few)[0], few.parent)
    photo, hole = (
        np.asarray(x.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).astype(int)
        for x in (photo, masks.training_mask(mask, "segment"))
    )
    assert (made[hole == 0] == photo[hole == 0]).all() and np.abs(made - photo)[
        hole == 255
    ].mean() > 5
    assert 50 < (hole == 255).sum() < SIZE * SIZE / 3


def test_nobody_answers(workflow, data, tmp_path):
    began = time.monotonic()
    run = start(workflow, data, tmp_path / "out", "--patience", "2", servers=["http://127.0.0.1:9"])
    _, error = finish(run, 1)
    assert (
        "No server has answered for" in error
        and "the same command again" in error
        and time.monotonic() - began < 20
    )


def test_a_prompt_that_fails_is_named_and_a_prompt_that_is_refused_stops_the_run(
    server, workflow, data, tmp_path
):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/scene 0.png").touch()
    arguments = ("--set", "Checkpoint.checkpoint=nan.safetensors")
    out, _ = finish(start(workflow, data, tmp_path / "out", *arguments, servers=[server.url]), 1)
    assert "21 samples: 0 kept, 21 skipped" in out and "error in CATLoadCheckpoint: 12" in out
    assert "NaN or Inf" in (tmp_path / "out/failed.jsonl").read_text() and not pictures(
        tmp_path / "out"
    )
    _, error = finish(
        start(workflow, data, tmp_path / "out", servers=[server.url]), 1
    )  # without --set: another run
    assert "holds a run with workflow_sha256" in error and "Choose another --out" in error
    _, error = finish(
        start(
            workflow,
            data,
            tmp_path / "none",
            "--set",
            "Checkpoint.checkpoint=none",
            servers=[server.url],
        ),
        1,
    )
    assert (
        "refuses /prompt (400)" in error
        and "CATLoadCheckpoint" in error
        and "There is no none in" in error
    )


def test_memory_does_not_grow_with_the_manifest(workflow, tmp_path):
    """Of 20,000 records whose pictures are missing; those that are made take the same way."""
    peaks = []
    for count in (100, 20_000):
        records = (
            {"id": f"{i:012}", "image": "none.jpg", "box": [0, 0, 1, 1], "label": "x"}
            for i in range(count)
        )
        out = tmp_path / str(count)
        run = start(
            workflow,
            write_manifest(tmp_path / f"{count}.jsonl", records),
            out,
            servers=["http://127.0.0.1:9"],
        )
        with run.stdout, run.stderr:
            peaks.append(os.wait4(run.pid, 0)[2].ru_maxrss / 1024)
            assert f"missing image: {count:,}" in run.stdout.read()
        assert len((out / "failed.jsonl").read_text().splitlines()) == count
    print(peaks)
    assert peaks[1] - peaks[0] < 10  # MB; the ids seen so far take 2


def change(nodes, title, **inputs):
    next(node for node in nodes.values() if node.get("_meta", {}).get("title") == title)[
        "inputs"
    ].update(inputs)


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
    plain, changed = (
        Workflow(BASELINES / "cat.json"),
        Workflow(BASELINES / "cat.json", ["Sampler.cfg=3", "Label.value=a=b.c"]),
    )
    assert plain.sha256 != changed.sha256 and changed.nodes["13"]["inputs"]["cfg"] == 3
    assert changed.nodes["4"]["inputs"]["value"] == "a=b.c"
    prompt = changed.prompt(photo="p", mask="m", label="spoon", seed=7)
    places = (("2", "image"), ("3", "image"), ("4", "value"), ("13", "noise_seed"))
    assert [prompt[number]["inputs"][name] for number, name in places] == ["p", "m", "spoon", 7]


def test_unusable_arguments_are_explained(workflow, data, tmp_path):
    for arguments, words in (
        (["--size", "100"], "multiple of 8"),
        (["--server", "127.0.0.1"], "http://127.0.0.1:8188"),
        (["--split", "dev"], "expected train, validation or test"),
        (["--out", "/dev/null/x"], "Cannot write"),
        (["--split", "validation"], "no record of split"),
        (["--manifest", "none"], "cannot be read"),
    ):
        run = subprocess.run(
            [
                sys.executable,
                ROOT / "tools/generate.py",
                workflow,
                "--manifest",
                data,
                "--out",
                tmp_path / "x",
                "--server",
                "http://127.0.0.1:9",
                *arguments,
            ],
            capture_output=True,
            text=True,
        )
        assert run.returncode in (1, 2) and words in run.stderr and "Traceback" not in run.stderr, (
            run.stderr
        )
