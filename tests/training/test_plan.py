"""tools/train.py plan: measured steps, the rest by count; presets that do not fit are said."""

import dataclasses
import re
import subprocess
import sys

import pytest
import torch
from paths import ROOT
from PIL import Image, ImageDraw

from cat_diffusion.cat_core.data import manifest
from cat_diffusion.cat_core.training.settings import Settings
from cat_diffusion.cat_core.training.stages import STAGES
from training import cost_plan, counts, measured_steps, presets, stage_parts, stage_run

pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four records."""
    folder = tmp_path_factory.mktemp("data")
    records = []
    for index in range(4):
        Image.new("RGB", (40, 32), (30 * index, 90, 200)).save(folder / f"{index}.png")
        mask = Image.new("L", (40, 32))
        ImageDraw.Draw(mask).ellipse((4, 4, 20 + index, 24), fill=255)
        mask.save(folder / f"{index}_mask.png")
        files = {"image": f"{index}.png", "mask": f"{index}_mask.png"}
        records.append(manifest.Record(f"r{index}", **files, label="cup"))
    manifest.write(folder / "manifest.jsonl", records)
    return folder / "manifest.jsonl"


def command(*words):
    done = [sys.executable, ROOT / "tools/train.py", *words]
    return subprocess.run(list(map(str, done)), capture_output=True, text=True)


def test_a_plan_says_what_a_run_takes_and_writes_nothing(tiny_file, data):
    before = sorted(data.parent.iterdir())
    words = ["plan", "ref-adapter", "--base", tiny_file, "--data", data, "--size", 64, "--cpu"]
    words += ["--batch-size", 8, "--preset", "24gb", "--micro-batch-size", 4]
    words += ["--steps", 1000, "--price-per-hour", 2, "--dataloader-num-workers", 1]
    done = command(*words)
    assert done.returncode == 0, done.stderr
    rows = (
        r"--micro-batch-size 4 is given, in the place of the preset's 16\.",
        r"Plan of ref-adapter, 1000 steps",
        r"of 8 samples, 4 at once, bf16, checkpointing, cached",
        r"measured on +a CPU, \d+ threads",
        r"with 1 at once, fp32, checkpointing, cached,\n.*extrapolated",
        r"steps/s +[\d.e-]+, [\d.]+ samples/s",
        r"waiting +[\d.]+% of a step for data; 1 workers prepare [\d.]+ samples/s",
        r"memory +[\d.]+ GB of the process at its peak, [\d.]+ GB are there",
        r"by count: 2\.\d GB of a GPU, 2 GB for PyTorch included",
        r"disk +[\d.e-]+ GB for 3 checkpoints, [\d.]+ GB are free",
        r"[\d.e-]+ GB for cache of 4 records",
        r"hours +[\d.e-]+ for 1000 steps, [\d.e-]+ to fill the cache before",
        r"cost +[\d.e-]+ at 2 an hour",
        r"hours on RTX 4090 at 40% of its bf16 peak, [\d.e-]+ in money: not measured",
    )
    for row in rows:
        assert re.search(row, done.stdout), f"{row}\n{done.stdout}"
    assert sorted(data.parent.iterdir()) == before


def measured(**changes):
    defaults = {
        "device": "a GPU",
        "is_gpu": True,
        "settings": Settings(micro_batch_size=4),
        "fixed": 0.5,
        "part": 0.25,
        "waiting": 0.0,
        "prepared": 1000.0,
        "workers": 2,
        "records": 10_000,
        "encoding": 0.1,
        "cache_bytes": 1e6,
        "encoding_flop": 0.0,
        "peak": 8e9,
        "memory": 12e9,
    }
    return measured_steps.MeasuredSteps(**defaults | changes)


def test_seconds_follow_from_parts_and_from_data():
    settings = Settings(batch_size=64)
    assert measured_steps.seconds_a_step(measured(), settings) == 0.5 + 16 * 0.25
    assert measured_steps.seconds_a_step(measured(), settings, cards=8) == 0.5 + 2 * 0.25
    assert measured_steps.seconds_a_step(measured(prepared=8.0), settings) == 64 / 8


def test_bytes_and_operations_are_counted(tiny, tiny_file):
    file = stage_parts.load([tiny_file], diffusion=True)
    stage = STAGES["ref-adapter"]
    one = counts.counted(stage, file, 1, size=64)
    four = counts.counted(stage, file, 4, size=64)
    modules, objective = stage_parts.build(stage, file)
    assert one.trained == sum(p.numel() for p in modules["ref_adapter"].parameters())
    assert one.trained + one.frozen == sum(p.numel() for p in objective.parameters())
    assert one.flop == four.flop > 0
    assert four.step > 2 * one.step
    recomputed = counts.counted(stage, file, 4, size=64, checkpointing=True)
    assert recomputed.flop > four.flop
    assert recomputed.step < four.step
    state = torch.optim.AdamW(modules["ref_adapter"].parameters())
    for parameter in modules["ref_adapter"].parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.step()
    moments = 0
    for values in state.state.values():
        moments += values["exp_avg"].nbytes + values["exp_avg_sq"].nbytes
    weights = sum(p.nbytes for p in modules["ref_adapter"].parameters())
    assert one.checkpoint(Settings()) == weights + moments
    eight_bit = Settings(use_8bit_adam=True, ema_decay=0.9)
    assert one.checkpoint(eight_bit) == weights + moments / 4 + weights


def test_each_preset_chooses_for_each_stage_that_fits():
    for name, preset in presets.PRESETS.items():
        for stage in preset.micro_batch_size:
            chosen = presets.choices(name, stage)
            assert 128 % (chosen["micro_batch_size"] * preset.cards) == 0
    assert presets.choices("24gb", "cascade")["use_8bit_adam"]
    with pytest.raises(presets.PresetError, match=r"12 GB, on which cascade does not fit by count"):
        presets.choices("12gb", "cascade")


def test_a_preset_for_a_larger_card_is_refused():
    words = r"24gb is for cards of 24 GB, RTX has 11.8 GB. Give --preset 12gb, or leave it out"
    with pytest.raises(presets.PresetError, match=words):
        presets.refuse_smaller_card("24gb", "RTX", 11.8)
    with pytest.raises(presets.PresetError, match=r"RTX has 7.9 GB. On this card leave it out"):
        presets.refuse_smaller_card("12gb", "RTX", 7.9)
    presets.refuse_smaller_card("24gb", "RTX", 23.6)


def test_a_preset_without_a_gpu_is_refused_before_anything_is_read(tmp_path, tiny_file, data):
    words = ["--base", tiny_file, "--data", data, "--run", tmp_path / "run", "--cpu"]
    done = command("sem-inpainter", *words, "--preset", "12gb")
    assert done.returncode == 1
    assert "--preset 12gb is for a GPU of 12 GB, and there is none" in done.stderr
    assert not (tmp_path / "run").exists()
    done = command("cascade", *words, "--preset", "12gb")
    assert done.returncode == 2
    assert "on which cascade does not fit by count. Give --preset 24gb" in done.stderr


def test_what_is_for_a_plan_alone_is_said(tiny_file, data):
    words = ["sem-inpainter", "--base", tiny_file, "--data", data]
    assert "--run is missing" in command(*words).stderr
    done = command(*words, "--run", "x", "--price-per-hour", 1)
    assert "--price-per-hour is for `plan`" in done.stderr


def test_what_does_not_fit_is_followed_by_what_to_change(tiny_file, data, tmp_path):
    settings = Settings(micro_batch_size=4, batch_size=8)
    described = stage_run.StageRun(STAGES["unet"], [tiny_file], data, tmp_path, settings, size=64)
    taken = dataclasses.replace(
        counts.counted(described.stage, stage_parts.load([tiny_file], True), 4, size=64), step=30e9
    )
    text = "\n".join(cost_plan.memory_rows(described, taken, measured(memory=24e9), ""))
    assert "more than 24.0 GB" in text
    for change in ("--micro-batch-size 2", "--checkpointing", "--cache", "--use-8bit-adam"):
        assert f"to change: {change}" in text
    slow = "\n".join(cost_plan.waiting_rows(measured(prepared=5.0), rate=10.0))
    assert "50.0% of a step for data" in slow
    assert "more --dataloader-num-workers" in slow
