"""FSDP with two real processes: the run of one, in pieces, and checkpoints that are whole."""

import os
import re
import subprocess
import sys

import psutil
import pytest
import torch
from tiny_runs import SQUASHED, command, log_rows, losses, train, wait_for

from cat_diffusion.cat_core import weights
from cat_diffusion.cat_core.training import checkpoints, fsdp
from cat_diffusion.cat_core.training.settings import Settings, TrainingError

pytest.importorskip("accelerate")

SHARED = (*SQUASHED, "--micro-batch-size", "1", "--max-grad-norm", "1", "--use-ema")
SHARED += ("--ema-decay", "0.5", "--validate-every", "2", "--validation-split", "train")
SHARED += ("--validation-samples", "4", "--samples-every", "0")


def begin_in_two(stage, base, data, run, *more):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    _, *arguments = command(stage, base, data, run, *more, "--fsdp")
    arguments[arguments.index("--run")] = "--output-dir"
    return subprocess.Popen(
        [*launch, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def train_in_two(*arguments):
    process = begin_in_two(*arguments)
    output, errors = process.communicate()
    assert process.returncode == 0, output + errors
    return output


def tensors(run, name):
    return weights.load_safetensors(str(checkpoints.newest(run) / name))[0]


@pytest.mark.once
def test_two_processes_in_pieces_are_one(tiny_file, data, tmp_path):
    one = tmp_path / "one"
    two = tmp_path / "two"
    train("cascade", tiny_file, data, one, "--steps", 4, *SHARED)
    said = train_in_two("cascade", tiny_file, data, two, "--steps", "2", *SHARED)
    kept = re.findall(r"Process (\d) of 2: keeps ([\d,]+) of ([\d,]+) numbers in training", said)
    assert sorted(number for number, _, _ in kept) == ["1", "2"]
    for _, own, whole in kept:
        assert int(own.replace(",", "")) == pytest.approx(int(whole.replace(",", "")) / 2, rel=0.05)
    train_in_two("cascade", tiny_file, data, two, "--steps", "3", *SHARED)  # in pieces again
    train("cascade", tiny_file, data, two, "--steps", 4, *SHARED)  # and whole

    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    norms = [[float(row["grad_norm"]) for row in log_rows(run)] for run in (one, two)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    for name in (checkpoints.WEIGHTS, checkpoints.EMA):
        expected = tensors(one, name)
        found = tensors(two, name)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=2e-5)
    lines = [(run / "validation.csv").read_text().splitlines() for run in (one, two)]
    assert lines[0][0] == lines[1][0]
    assert {"loss", "ema_loss"} <= set(lines[0][0].split(","))


@pytest.mark.once
def test_a_process_that_is_killed_is_a_sentence_of_the_other(tiny_file, data, tmp_path):
    run = tmp_path / "run"
    process = begin_in_two("sem-inpainter", tiny_file, data, run, "--steps", "100000", *SHARED)
    wait_for(lambda: (run / "checkpoint-00000002").exists())
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    workers[1].kill()
    output, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "error: Another process of the run has ended" in errors, output + errors
    assert "start the same command again, which goes on from there" in errors


@pytest.mark.parametrize(
    ("settings", "processes", "said"),
    [
        (Settings(fsdp=True), 1, "there is one. Start it with torchrun"),
        (Settings(fsdp=True, use_8bit_adam=True), 2, "--use-8bit-adam does not work"),
        (Settings(fsdp=True, dynamo_backend="inductor"), 2, "--dynamo-backend does not work"),
        (Settings(fsdp=True, precision="fp16"), 2, "--precision fp16 does not work"),
    ],
)
def test_what_fsdp_cannot_do_is_said(settings, processes, said):
    with pytest.raises(TrainingError, match=said):
        fsdp.refuse(settings, processes)
