"""tools/train.py as a user runs it, on tiny models and pictures: every stage, interruption, several processes."""

import csv
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from paths import ROOT
from PIL import Image, ImageDraw

pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A manifest of 20 small pictures with masks or boxes, one corrupt picture and one hole-free one."""
    from cat_diffusion.cat_core.data import manifest

    folder = tmp_path_factory.mktemp("data")
    records = []
    for i in range(20):
        rng = np.random.default_rng(i)
        picture = Image.fromarray(rng.integers(0, 255, (40, 48, 3), np.uint8)).resize((96, 80))
        mask = Image.new("L", (96, 80))
        ImageDraw.Draw(mask).ellipse((10 + i, 10, 40 + i, 50), fill=255)
        picture.save(folder / f"{i}.png")
        mask.save(folder / f"{i}_mask.png")
        where = {"mask": f"{i}_mask.png"} if i % 3 else {"box": (0.1, 0.2, 0.5, 0.7)}
        records.append(manifest.Record(f"s{i}", f"{i}.png", label=("spoon", "cup")[i % 2], **where))
    (folder / "7.png").write_bytes((folder / "7.png").read_bytes()[:100])
    picture.save(folder / "free.png")
    records.append(manifest.Record("free", "free.png", caption="an empty table"))
    manifest.write(folder / "manifest.jsonl", records)
    return folder / "manifest.jsonl"


def command(stage, base, data, run, *more):
    bases = base if isinstance(base, list) else [base]
    return [
        sys.executable,
        ROOT / "tools/train.py",
        stage,
        "--base",
        *bases,
        "--data",
        data,
        "--run",
        run,
        "--batch-size",
        "4",
        "--micro-batch-size",
        "2",
        "--size",
        "64",
        "--cpu",
        "--save-every",
        "2",
        *map(str, more),
    ]


def train(*arguments, code=0, **kwargs):
    run = subprocess.run(command(*arguments), capture_output=True, text=True, **kwargs)
    assert run.returncode == code, run.stdout[-2000:] + run.stderr[-3000:]
    return run


def losses(run):
    with open(run / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    return [float(row["loss"]) for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(tiny_file, data, tmp_path_factory):
    """Six steps of stage 1 in one go."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    train("sem-inpainter", tiny_file, data, run, "--steps", 6)
    return run


def test_stage_1_learns_and_writes_cat_weights(uninterrupted, tiny_file):
    from cat_diffusion.cat_core import weights

    values = losses(uninterrupted)
    assert len(values) == 6 and values[-1] < values[0]
    file = weights.read(uninterrupted / "checkpoint-00000006/weights.safetensors")
    assert (
        list(file.parts) == ["sem_inpainter"]
        and file.architecture.sem_inpainter.num_attention_heads == 4
    )
    assert "stage sem-inpainter, 6 steps" in file.metadata["provenance"]
    assert sorted(path.name for path in uninterrupted.glob("checkpoint*")) == [
        "checkpoint-00000004",
        "checkpoint-00000006",
    ]
    with open(uninterrupted / "log.csv", newline="") as log:
        row = next(csv.DictReader(log))
    assert -1 <= float(row["cosine"]) <= 1 and -1 <= float(row["cosine_observed"]) <= 1


def test_after_kill_9_the_same_losses_follow(uninterrupted, tiny_file, data, tmp_path):
    run = tmp_path / "killed"
    process = subprocess.Popen(
        command("sem-inpainter", tiny_file, data, run, "--steps", 6),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 120
    while not (run / "checkpoint-00000002").exists() and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (run / "checkpoint-00000002").exists()
    train("sem-inpainter", tiny_file, data, run, "--steps", 6)
    assert losses(run) == losses(uninterrupted)


def test_ctrl_c_saves_and_leaves(uninterrupted, tiny_file, data, tmp_path):
    run = tmp_path / "stopped"
    process = subprocess.Popen(
        command("sem-inpainter", tiny_file, data, run, "--steps", 100_000, "--save-every", 100_000),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    end = time.monotonic() + 120
    while (
        not ((run / "log.csv").exists() and len((run / "log.csv").read_text().splitlines()) > 3)
        and time.monotonic() < end
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "The same command continues" in output
    saved = sorted(run.glob("checkpoint-*"))
    assert len(saved) == 1 and len(losses(run)) == int(saved[0].name[-8:])
    both = min(len(losses(run)), 6)
    assert losses(run)[:both] == losses(uninterrupted)[:both]


def test_two_processes_give_the_losses_of_one(uninterrupted, tiny_file, data, tmp_path):
    run = tmp_path / "two"
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
    ]
    arguments = command(
        "sem-inpainter", tiny_file, data, run, "--steps", "6", "--micro-batch-size", "1"
    )[1:]
    done = subprocess.run(
        [*launch, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(run) == pytest.approx(losses(uninterrupted), rel=1e-5)


def test_the_cache_is_filled_once_and_gives_the_same_losses(
    uninterrupted, tiny_file, data, tmp_path
):
    cache = tmp_path / "cache"
    first = train("sem-inpainter", tiny_file, data, tmp_path / "a", "--steps", 2, "--cache", cache)
    assert "corrupt image: 1 (s7)" in first.stdout
    shards = {path: path.stat().st_mtime_ns for path in cache.glob("shard-*")}
    assert shards and losses(tmp_path / "a") == pytest.approx(losses(uninterrupted)[:2], rel=1e-2)
    data.rename(data.with_name("gone.jsonl"))
    try:
        os.rename(
            data.parent / "3.png", data.parent / "hidden.png"
        )  # pictures are not opened again
        data.with_name("gone.jsonl").rename(data)
        train("sem-inpainter", tiny_file, data, tmp_path / "b", "--steps", 2, "--cache", cache)
    finally:
        os.rename(data.parent / "hidden.png", data.parent / "3.png")
    assert losses(tmp_path / "b") == losses(tmp_path / "a")
    assert shards == {path: path.stat().st_mtime_ns for path in cache.glob("shard-*")}


def test_stage_1_can_use_a_diffusion_stages_cache(uninterrupted, tiny_file, data, tmp_path):
    cache = tmp_path / "cache"
    train("unet", tiny_file, data, tmp_path / "unet", "--steps", 1, "--cache", cache)
    train("sem-inpainter", tiny_file, data, tmp_path / "sem", "--steps", 2, "--cache", cache)
    assert losses(tmp_path / "sem") == pytest.approx(losses(uninterrupted)[:2], rel=1e-2)
    next(cache.glob("shard-*")).unlink()
    broken = train(
        "sem-inpainter",
        tiny_file,
        data,
        tmp_path / "broken",
        "--steps",
        2,
        "--cache",
        cache,
        code=1,
    )
    assert "is not complete. Start that stage first" in broken.stderr


def test_rates_rise_and_decay():
    from cat_diffusion.cat_core.training.loop import Settings, _rate

    constant, falling = (
        Settings(steps=100, warmup=10),
        Settings(steps=100, warmup=10, final_rate=0.1),
    )
    assert [_rate(step, constant) for step in (0, 4, 9, 50, 99)] == pytest.approx(
        [0.1, 0.5, 1, 1, 1]
    )
    assert [_rate(step, falling) for step in (50, 100)] == pytest.approx([0.55, 0.1])


@pytest.mark.parametrize(
    "stage, parts, more",
    [
        ("unet", {"unet"}, ["--rates", 2, "--samples-every", 2]),
        ("ref-adapter-observed", {"ref_adapter", "unet"}, ["--samples-every", 2]),
        ("ref-adapter", {"ref_adapter"}, ["--checkpointing", "--samples-every", 2]),
        ("ref-adapter-unet", {"ref_adapter", "unet"}, []),
        ("cascade-sem-inpainter", {"sem_inpainter"}, []),
        (
            "cascade",
            {"sem_inpainter", "ref_adapter", "unet"},
            ["--precision", "bf16", "--samples-every", 2],
        ),
    ],
)
def test_every_other_stage_trains_its_parts_and_resumes(
    tiny_file, data, tmp_path, stage, parts, more
):
    from cat_diffusion.cat_core import weights

    train(stage, tiny_file, data, tmp_path / "run", "--steps", 2, *more)
    train(stage, tiny_file, data, tmp_path / "run", "--steps", 4, *more)
    assert len(losses(tmp_path / "run")) == 4
    file = weights.read(tmp_path / "run/checkpoint-00000004/weights.safetensors")
    assert set(file.parts) == parts
    if "--samples-every" not in more:
        return
    two, four = sheets(tmp_path / "run")  # input, inpainted, original
    changed = [
        (two[:, left : left + 256] != four[:, left : left + 256]).any() for left in (0, 256, 512)
    ]
    assert changed == [False, True, False]


def test_fresh_parts_on_a_plain_inpainting_checkpoint(tiny, data, tmp_path):
    """No CAT part anywhere: they are made as wide as CLIP, and RefAdapter starts without effect."""
    import dataclasses

    import torch

    from cat_diffusion.cat_core import weights

    parts, architecture = tiny
    plain = dataclasses.replace(architecture, sem_inpainter=None, ref_adapter=None)
    header = {"format": "cat-diffusion", "format_version": "1", "architecture": plain.to_json()}
    weights.save(
        tmp_path / "base.safetensors",
        weights.flat({part: parts[part] for part in ("unet", "vae", "clip_text")}),
        header,
    )
    weights.save(tmp_path / "vision.safetensors", parts["clip_vision"], {"format": "pt"})
    bases = [tmp_path / "base.safetensors", tmp_path / "vision.safetensors"]
    train("sem-inpainter", bases, data, tmp_path / "one", "--steps", 1)
    results = [
        tmp_path / f"{run}/checkpoint-00000001/weights.safetensors" for run in ("one", "two")
    ]
    train("ref-adapter", [*bases, results[0]], data, tmp_path / "two", "--steps", 1)
    file = weights.read(results[1])
    assert file.architecture.ref_adapter.blocks == architecture.ref_adapter.blocks
    out = file.parts["ref_adapter"]["middle_block.1.transformer_blocks.0.attn3.to_out.0.weight"]
    assert out.abs().max() <= 2e-4 and torch.count_nonzero(out)  # one step away from zero
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "tools/convert.py",
            *bases,
            *results,
            "--full",
            tmp_path / "full.safetensors",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    full = weights.read(tmp_path / "full.safetensors")
    full.require(*weights.PREFIXES)
    assert full.architecture.unet_num_heads == full.architecture.ref_adapter.num_heads == 4


def test_sample_pictures_show_similarity_and_change_no_loss(
    uninterrupted, tiny_file, data, tmp_path
):
    train("sem-inpainter", tiny_file, data, tmp_path / "run", "--steps", 4, "--samples-every", 2)
    assert losses(tmp_path / "run") == losses(uninterrupted)[:4]
    two, four = sheets(tmp_path / "run")
    assert (two[20:276, 256:512] == four[20:276, 256:512]).all() and (
        two[20:276, 512:] != four[20:276, 512:]
    ).any()


def sheets(run):
    """The two sheets of four samples."""
    paths = sorted((run / "samples").iterdir())
    assert [path.name for path in paths] == ["step-00000002.png", "step-00000004.png"]
    pictures = [np.asarray(Image.open(path)).astype(int) for path in paths]
    assert all(picture.shape == (20 + 4 * 276, 3 * 256, 3) for picture in pictures)
    return pictures


def test_another_run_in_the_folder_is_not_continued(uninterrupted, tiny_file, data):
    run = train("sem-inpainter", tiny_file, data, uninterrupted, "--steps", 6, "--seed", 5, code=1)
    assert "seed was 0, is 5" in run.stderr and "Traceback" not in run.stderr
    run = train("ref-adapter", tiny_file, data, uninterrupted, "--steps", 6, code=1)
    assert "stage was sem-inpainter, is ref-adapter" in run.stderr


def test_a_full_disk_loses_nothing(tiny_file, data, tmp_path):
    run = tmp_path / "run"
    train("sem-inpainter", tiny_file, data, run, "--steps", 2)
    before = (run / "checkpoint-00000002/weights.safetensors").read_bytes()

    def small_files():
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    failed = train(
        "sem-inpainter", tiny_file, data, run, "--steps", 4, code=1, preexec_fn=small_files
    )
    assert (
        "Cannot write" in failed.stderr
        and "checkpoint-00000002" in failed.stderr
        and "Free disk space" in failed.stderr
    )
    assert (run / "checkpoint-00000002/weights.safetensors").read_bytes() == before and not list(
        run.glob("*.partial")
    )
    train("sem-inpainter", tiny_file, data, run, "--steps", 4)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(tiny_file, data, tmp_path):
    """A learning rate that no weights survive, set in the stage as data."""
    code = """
import sys; sys.path[:0] = [TOOLS]; sys.argv[1:] = ARGUMENTS
import dataclasses, train
from comfyui import launch
launch.start_host()
from cat_diffusion.cat_core.training import stages
stages.STAGES["sem-inpainter"] = dataclasses.replace(stages.STAGES["sem-inpainter"], rates=(("sem_inpainter", 1e30),))
sys.exit(train.main())
"""
    arguments = [
        str(word)
        for word in command("sem-inpainter", tiny_file, data, tmp_path / "run", "--steps", "9")[2:]
    ]
    code = code.replace("TOOLS", repr(str(ROOT / "tools"))).replace("ARGUMENTS", repr(arguments))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1 and "The loss of step" in run.stderr and "nan" in run.stderr, (
        run.stderr[-2000:]
    )


def test_settings_that_do_not_fit_are_explained(tiny_file, data, tmp_path):
    run = train("sem-inpainter", tiny_file, data, tmp_path / "run", "--batch-size", 3, code=1)
    assert "batch_size 3 is not a multiple" in run.stderr
    without_cpu = [
        word
        for word in command("sem-inpainter", tiny_file, tmp_path / "none.jsonl", tmp_path / "run")
        if word != "--cpu"
    ]
    run = subprocess.run(
        without_cpu, capture_output=True, text=True
    )  # a machine without a GPU needs no flag
    assert run.returncode == 1 and "cannot be read" in run.stderr and "Traceback" not in run.stderr
    run = train("sem-inpaint", tiny_file, data, tmp_path / "run", code=2)
    assert "unknown stage sem-inpaint; choose from sem-inpainter" in run.stderr
    run = train("sem-inpainter", tiny_file, tmp_path / "none.jsonl", tmp_path / "run", code=1)
    assert "cannot be read" in run.stderr and "prepare_data" in run.stderr
