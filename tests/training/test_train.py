"""tools/train.py as a user runs it, on tiny models and pictures.

Every stage, interruption, several processes.
"""

import dataclasses
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from paths import ROOT
from PIL import Image
from tiny_runs import SQUASHED, command, log_rows, losses, train, wait_for

from cat_diffusion.cat_core import weights
from cat_diffusion.cat_core.data import manifest
from cat_diffusion.cat_core.training.optimisation import rate_share
from cat_diffusion.cat_core.training.settings import Settings

pytest.importorskip("accelerate")

SIDE = 256  # pixels of a picture on a sheet
TITLE = 20  # pixels of the line above a row of pictures


def names(paths):
    return sorted(path.name for path in paths)


def stamps(cache):
    """When each shard was written."""
    return {path: path.stat().st_mtime_ns for path in cache.glob("shard-*")}


@pytest.fixture(scope="module")
def uninterrupted(tiny_file, data, tmp_path_factory):
    """Six steps of stage 1 in one go."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    train("sem-inpainter", tiny_file, data, run, "--steps", 6)
    return run


@pytest.fixture(scope="module")
def whole_pictures(tiny_file, data, tmp_path_factory):
    """The same with whole pictures, of which a cache holds what every step sees."""
    run = tmp_path_factory.mktemp("runs") / "whole_pictures"
    train("sem-inpainter", tiny_file, data, run, "--steps", 6, *SQUASHED)
    return run


def test_stage_1_learns_and_writes_cat_weights(uninterrupted):
    values = losses(uninterrupted)
    assert len(values) == 6
    assert values[-1] < values[0]
    file = weights.read(uninterrupted / "checkpoint-00000006/weights.safetensors")
    assert list(file.parts) == ["sem_inpainter"]
    assert file.architecture.sem_inpainter.num_attention_heads == 4
    assert "stage sem-inpainter, 6 steps" in file.metadata["provenance"]
    kept = names(uninterrupted.glob("checkpoint*"))
    assert kept == ["checkpoint-00000004", "checkpoint-00000006"]
    for row in log_rows(uninterrupted):
        assert -1 <= float(row["cosine"]) <= 1
        assert -1 <= float(row["cosine_observed"]) <= 1


def test_after_kill_9_the_same_losses_follow(uninterrupted, tiny_file, data, tmp_path):
    run = tmp_path / "killed"
    process = subprocess.Popen(
        command("sem-inpainter", tiny_file, data, run, "--steps", 6),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for((run / "checkpoint-00000002").exists)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (run / "checkpoint-00000002").exists()
    train("sem-inpainter", tiny_file, data, run, "--steps", 6)
    assert losses(run) == losses(uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_leaves(uninterrupted, tiny_file, data, tmp_path, number):
    """As terminals and schedulers stop a job: all its processes at once, workers too."""
    run = tmp_path / "stopped"
    log = run / "log.csv"
    many = 100_000
    process = subprocess.Popen(
        command(
            "sem-inpainter",
            tiny_file,
            data,
            run,
            "--steps",
            many,
            "--save-every",
            many,
            "--dataloader-num-workers",
            1,
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 3)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "The same command continues" in output
    (saved,) = run.glob("checkpoint-*")
    assert len(losses(run)) == int(saved.name[-8:])
    both = min(len(losses(run)), 6)
    assert losses(run)[:both] == losses(uninterrupted)[:both]


def test_two_processes_give_the_losses_of_one(whole_pictures, tiny_file, data, tmp_path):
    run = tmp_path / "two"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    _, *arguments = command(
        "sem-inpainter", tiny_file, data, run, "--steps", "6", "--micro-batch-size", "1", *SQUASHED
    )
    # torchrun reads what is before its script alone, but finds --run in there ambiguous.
    arguments[arguments.index("--run")] = "--output-dir"
    done = subprocess.run(
        [*launch, *arguments, "--cache", tmp_path / "cache"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr  # whose error comes first
    for number in (1, 2):
        assert f"Process {number} of 2: encodes on cpu, trains on cpu" in done.stdout
    assert losses(run) == pytest.approx(losses(whole_pictures), rel=1e-2)  # the cache rounds


def test_the_cache_is_filled_once_and_gives_the_same_losses(
    whole_pictures, tiny_file, data, tmp_path
):
    cache = tmp_path / "cache"
    more = ["--steps", 2, "--cache", cache, *SQUASHED]
    first = train("sem-inpainter", tiny_file, data, tmp_path / "a", *more)
    assert "corrupt image: 1 (s7)" in first.stdout
    shards = stamps(cache)
    assert shards
    assert losses(tmp_path / "a") == pytest.approx(losses(whole_pictures)[:2], rel=1e-2)
    picture = data.parent / "3.png"
    hidden = picture.rename(data.parent / "hidden.png")  # pictures are not opened again
    try:
        train("sem-inpainter", tiny_file, data, tmp_path / "b", *more)
    finally:
        hidden.rename(picture)
    assert losses(tmp_path / "b") == losses(tmp_path / "a")
    assert stamps(cache) == shards


def test_a_cache_in_bytes_is_smaller_and_gives_nearly_the_same_losses(
    whole_pictures, tiny_file, data, tmp_path
):
    size = {}
    for dtype in ("fp16", "int8"):
        cache = tmp_path / dtype
        more = ["--steps", 2, "--cache", cache, "--cache-dtype", dtype, *SQUASHED]
        train("sem-inpainter", tiny_file, data, tmp_path / f"run-{dtype}", *more)
        size[dtype] = sum(path.stat().st_size for path in cache.glob("shard-*"))
    assert size["int8"] < 0.6 * size["fp16"]
    assert losses(tmp_path / "run-int8") == pytest.approx(losses(whole_pictures)[:2], rel=1e-2)
    assert losses(tmp_path / "run-int8") != losses(tmp_path / "run-fp16")
    more = ["--steps", 2, "--cache", tmp_path / "int8", *SQUASHED]
    refused = train("sem-inpainter", tiny_file, data, tmp_path / "other", *more, code=1)
    assert "dtype was int8, is fp16" in refused.stderr


def test_stages_share_a_cache_and_add_what_they_read(whole_pictures, tiny_file, data, tmp_path):
    more = ["--steps", 2, "--cache", tmp_path / "cache", *SQUASHED]
    train("cascade-sem-inpainter", tiny_file, data, tmp_path / "cascade", *more)
    added = train("sem-inpainter", tiny_file, data, tmp_path / "sem", *more)
    assert "it lacks teacher_image, teacher_patches, which are encoded besides" in added.stdout
    assert losses(tmp_path / "sem") == pytest.approx(losses(whole_pictures)[:2], rel=1e-2)
    shards = stamps(tmp_path / "cache")
    train("unet", tiny_file, data, tmp_path / "unet", *more)
    assert stamps(tmp_path / "cache") == shards


def test_two_manifests_in_shares(tiny_file, data, tmp_path):
    folder = data.parent / "more"
    folder.mkdir()
    (folder / "0.png").write_bytes((data.parent / "0.png").read_bytes())
    record = manifest.Record("more", "0.png", box=(0.1, 0.2, 0.5, 0.7), label="cup")
    manifest.write(folder / "m.jsonl", [record])
    more = ["--manifest", folder / "m.jsonl", "--steps", 1]
    run = tmp_path / "run"
    train("sem-inpainter", tiny_file, data, run, *more, "--weights", 80, 20)
    file = weights.read(run / "checkpoint-00000001/weights.safetensors")
    assert "trained on manifest.jsonl, m.jsonl;" in file.metadata["provenance"]
    other = train("sem-inpainter", tiny_file, data, run, *more, "--weights", 50, 50, code=1)
    assert "weights of manifests was 80 20, is 50 50" in other.stderr
    one = train("sem-inpainter", tiny_file, data, run, "--weights", 80, 20, code=2)
    assert "--weights gives 2 for 1 manifests, expected one each" in one.stderr


def test_rates_rise_and_decay():
    constant = Settings(steps=100, warmup=10)
    shares = [rate_share(step, constant) for step in (0, 4, 9, 50, 99)]
    assert shares == pytest.approx([0.1, 0.5, 1, 1, 1])
    falling = Settings(steps=100, warmup=10, final_rate=0.1)
    shares = [rate_share(step, falling) for step in (50, 100)]
    assert shares == pytest.approx([0.55, 0.1])


@pytest.mark.parametrize(
    "stage, parts, more",
    [
        ("unet", {"unet"}, ["--rates", 2, "--samples-every", 2]),
        ("ref-adapter-observed", {"ref_adapter", "unet"}, ["--samples-every", 2]),
        ("ref-adapter", {"ref_adapter"}, ["--checkpointing", "--samples-every", 2]),
        ("ref-adapter-unet", {"ref_adapter", "unet"}, []),
        (
            "ref-adapter-lora",
            {"ref_adapter", "unet_lora"},
            ["--lora-rank", 4, "--checkpointing", "--samples-every", 2],
        ),
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
    run = tmp_path / "run"
    train(stage, tiny_file, data, run, "--steps", 2, *more)
    train(stage, tiny_file, data, run, "--steps", 4, *more)
    assert len(losses(run)) == 4
    file = weights.read(run / "checkpoint-00000004/weights.safetensors")
    assert set(file.parts) == parts
    if "--samples-every" not in more:
        return
    two, four = sheets(run)
    assert np.array_equal(column(two, 0), column(four, 0))  # input
    assert not np.array_equal(column(two, 1), column(four, 1))  # inpainted
    assert np.array_equal(column(two, 2), column(four, 2))  # original


def test_fresh_parts_on_a_plain_inpainting_checkpoint(tiny, data, tmp_path):
    """No CAT part anywhere: new ones are as wide as CLIP, and RefAdapter has no effect at first."""
    parts, architecture = tiny
    plain = dataclasses.replace(architecture, sem_inpainter=None, ref_adapter=None)
    header = {"format": "cat-diffusion", "format_version": "1", "architecture": plain.to_json()}
    base = {part: parts[part] for part in ("unet", "vae", "clip_text")}
    weights.save(tmp_path / "base.safetensors", weights.flat(base), header)
    weights.save(tmp_path / "vision.safetensors", parts["clip_vision"], {"format": "pt"})
    bases = [tmp_path / "base.safetensors", tmp_path / "vision.safetensors"]

    sem_inpainter = tmp_path / "one/checkpoint-00000001/weights.safetensors"
    ref_adapter = tmp_path / "two/checkpoint-00000001/weights.safetensors"
    train("sem-inpainter", bases, data, tmp_path / "one", "--steps", 1)
    train("ref-adapter", [*bases, sem_inpainter], data, tmp_path / "two", "--steps", 1)
    file = weights.read(ref_adapter)
    assert file.architecture.ref_adapter.blocks == architecture.ref_adapter.blocks
    key = "middle_block.1.transformer_blocks.0.attn3.to_out.0.weight"
    output = file.parts["ref_adapter"][key]
    assert torch.count_nonzero(output)
    assert output.abs().max() <= 2e-4  # one step away from zero

    full = tmp_path / "full.safetensors"
    convert = [sys.executable, ROOT / "tools/convert.py", *bases, sem_inpainter, ref_adapter]
    done = subprocess.run([*convert, "--full", full], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole = weights.read(full)
    whole.require(*weights.PREFIXES)
    assert whole.architecture.unet_num_heads == 4
    assert whole.architecture.ref_adapter.num_heads == 4


def test_sample_pictures_show_similarity_and_change_no_loss(
    uninterrupted, tiny_file, data, tmp_path
):
    run = tmp_path / "run"
    train("sem-inpainter", tiny_file, data, run, "--steps", 4, "--samples-every", 2)
    assert losses(run) == losses(uninterrupted)[:4]
    two, four = sheets(run)
    first_row = slice(TITLE, TITLE + SIDE)
    assert np.array_equal(column(two, 1)[first_row], column(four, 1)[first_row])  # observed
    assert not np.array_equal(column(two, 2)[first_row], column(four, 2)[first_row])  # predicted


def sheets(run):
    """The two sheets of four samples."""
    folder = run / "samples"
    expected = ["step-00000002.png", "step-00000004.png"]
    assert names(folder.iterdir()) == expected
    pictures = [np.asarray(Image.open(folder / name)) for name in expected]
    for picture in pictures:
        assert picture.shape == (TITLE + 4 * (SIDE + TITLE), 3 * SIDE, 3)
    return pictures


def column(sheet, number):
    return sheet[:, number * SIDE : (number + 1) * SIDE]


def test_another_run_in_the_folder_is_not_continued(uninterrupted, tiny_file, data):
    run = train("sem-inpainter", tiny_file, data, uninterrupted, "--steps", 6, "--seed", 5, code=1)
    assert "seed was 0, is 5" in run.stderr
    assert "Traceback" not in run.stderr
    run = train("ref-adapter", tiny_file, data, uninterrupted, "--steps", 6, code=1)
    assert "stage was sem-inpainter, is ref-adapter" in run.stderr
    more = ["--steps", 6, "--masked", "--rates", 2]
    run = train("sem-inpainter", tiny_file, data, uninterrupted, *more, code=1)
    assert "rate of sem_inpainter was 0.0001, is 0.0002" in run.stderr
    assert "masked was False, is True" in run.stderr


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="tells by /proc what is being imported")
def test_ctrl_c_during_imports_leaves_without_a_traceback(tiny_file, data, tmp_path):
    process = subprocess.Popen(
        command("sem-inpainter", tiny_file, data, tmp_path / "run"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

    def imports_torch():
        with open(f"/proc/{process.pid}/maps") as maps:
            return "libtorch" in maps.read()

    wait_for(imports_torch)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert output.strip() == "Stopped before anything was read or written."
    assert not (tmp_path / "run").exists()


def small_files():
    """Let no file of this process grow beyond 50 kB, as if the disk were full."""
    import resource  # Windows has no such module

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))


def test_a_full_disk_loses_nothing(tiny_file, data, tmp_path):
    run = tmp_path / "run"
    train("sem-inpainter", tiny_file, data, run, "--steps", 2)
    path = run / "checkpoint-00000002/weights.safetensors"
    before = path.read_bytes()
    more = ["--steps", 4, "--dataloader-num-workers", 0]
    failed = train("sem-inpainter", tiny_file, data, run, *more, code=1, preexec_fn=small_files)
    for words in ("Cannot write", "checkpoint-00000002", "Free disk space"):
        assert words in failed.stderr
    assert path.read_bytes() == before
    assert not list(run.glob("*.partial"))
    more[-1] = 1
    failed = train("sem-inpainter", tiny_file, data, run, *more, code=1, preexec_fn=small_files)
    assert "cannot get shared memory for them. Give fewer" in failed.stderr
    train("sem-inpainter", tiny_file, data, run, "--steps", 4)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(tiny_file, data, tmp_path):
    """A learning rate that no weights survive, set in the stage as data."""
    _, _, *arguments = command("sem-inpainter", tiny_file, data, tmp_path / "run", "--steps", "9")
    code = f"""
import dataclasses, sys
sys.path.insert(0, {str(ROOT / "tools")!r})
sys.argv[1:] = {arguments!r}
import train
from comfyui import launch
launch.start_host()
from cat_diffusion.cat_core.training.stages import STAGES
rates = (("sem_inpainter", 1e30),)
STAGES["sem-inpainter"] = dataclasses.replace(STAGES["sem-inpainter"], rates=rates)
sys.exit(train.main())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1, run.stderr[-2000:]
    assert "The loss of step" in run.stderr, run.stderr[-2000:]
    assert "nan" in run.stderr


def test_settings_that_do_not_fit_are_explained(tiny_file, data, tmp_path):
    run = train("sem-inpainter", tiny_file, data, tmp_path / "run", "--batch-size", 3, code=2)
    assert "batch_size 3 is not a multiple" in run.stderr
    run = train("sem-inpainter", tiny_file, data, tmp_path / "run", "--steps", 0, code=2)
    assert "--steps is 0, expected 1 up" in run.stderr
    run = train("sem-inpainter", tmp_path / "no.ckpt", data, tmp_path / "run", code=2)
    assert "no.ckpt is no file, expected one with weights" in run.stderr
    run = train("sem-inpaint", tiny_file, data, tmp_path / "run", code=2)
    assert "unknown stage sem-inpaint; choose from sem-inpainter" in run.stderr
    run = train("sem-inpainter", tiny_file, tmp_path / "none.jsonl", tmp_path / "run", code=1)
    assert "cannot be read" in run.stderr
    assert "prepare_data" in run.stderr


def test_a_machine_without_a_gpu_needs_no_flag(tiny_file, tmp_path):
    words = command("sem-inpainter", tiny_file, tmp_path / "none.jsonl", tmp_path / "run")
    words.remove("--cpu")
    run = subprocess.run(words, capture_output=True, text=True)
    assert run.returncode == 1
    assert "cannot be read" in run.stderr
    assert "Traceback" not in run.stderr
