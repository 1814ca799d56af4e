"""How weights are optimised: clipping, moving averages, skipped steps, schedules, weights of steps.

In one process, on a tiny SemInpainter that learns a number.
"""

import csv
import subprocess
import sys

import pytest
import torch
from paths import ROOT
from plain_objective import PlainObjective
from torch import nn

from cat_diffusion.cat_core import weights
from cat_diffusion.cat_core.models.sem_inpainter import SemInpainter
from cat_diffusion.cat_core.training import checkpoints, identity, loop
from cat_diffusion.cat_core.training.average import MovingAverage
from cat_diffusion.cat_core.training.objectives import (
    Diffusion,
    snr_weight,
    stable_diffusion_schedule,
)
from cat_diffusion.cat_core.training.settings import Settings, TrainingError, TrainingRun
from cat_diffusion.cat_core.training.stages import STAGES

pytest.importorskip("accelerate")

PART = "sem_inpainter"


def source_of(bad_steps=()):
    """A batch source whose loss is infinite in some steps, the first of which is 1."""

    def source(step, positions):
        factor = torch.inf if step + 1 in bad_steps else 1.0
        return {"target": torch.tensor([float(step)]), "factor": torch.tensor([factor])}

    return source


@pytest.fixture
def make_run(tiny, tmp_path):
    """A run of stage 1, a checkpoint after each step."""

    def make_run(name="run", **changes):
        _, architecture = tiny
        torch.manual_seed(0)
        module = SemInpainter(architecture.sem_inpainter)
        defaults = {"steps": 4, "batch_size": 1, "micro_batch_size": 1, "save_every": 1}
        return TrainingRun(
            STAGES["sem-inpainter"],
            {PART: module},
            PlainObjective(module),
            Settings(**defaults | {"keep": 20} | changes),
            folder=tmp_path / name,
            architecture=architecture,
            provenance="x",
            licence="x",
            data={
                "manifests": ["cups.jsonl"],
                "records": 7,
                "split": "train",
                "licence": "CC BY 2.0",
            },
        )

    return make_run


def train(run, bad_steps=()):
    return loop.train(run, source_of(bad_steps), cpu=True)


def log_rows(run):
    with open(run.folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def parameters_of(checkpoint, name=checkpoints.WEIGHTS):
    return weights.read(checkpoint / name).parts[PART]


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# Clipping -----------------------------------------------------------------------------------------


def test_gradients_are_shortened_to_a_length(make_run):
    train(make_run("whole"))
    train(make_run("short", max_grad_norm=1e-6, steps=1))
    whole = log_rows(make_run("whole"))[0]
    short = log_rows(make_run("short"))[0]
    assert float(whole["grad_norm"]) == float(short["grad_norm"]) > 0  # as they were
    run = make_run("by hand")
    loss = PlainObjective(run.modules[PART])(source_of()(0, range(1)))[0]["distance"].sum()
    gradients = torch.autograd.grad(loss, list(run.modules[PART].parameters()), allow_unused=True)
    length = torch.cat([g.flatten() for g in gradients if g is not None]).norm()
    assert float(whole["grad_norm"]) == pytest.approx(length.item(), rel=1e-4)


def test_clipping_changes_what_is_learned_and_belongs_to_the_run(make_run):
    one = train(make_run("one", max_grad_norm=1e-9, steps=2))
    other = train(make_run("other", steps=2))
    assert not equal(parameters_of(one.parent), parameters_of(other.parent))
    with pytest.raises(TrainingError, match=r"max_grad_norm was 0.0, is 1.0"):
        train(make_run("other", max_grad_norm=1.0))


# Steps without numbers ----------------------------------------------------------------------------


def test_a_step_whose_gradients_are_no_numbers_is_skipped_and_counted(make_run):
    run = make_run()
    last = train(run, bad_steps={2}).parent
    assert [row["skipped"] for row in log_rows(run)] == ["0", "1", "1", "1"]
    saved = sorted(path.name for path in run.folder.glob("checkpoint-*"))
    assert saved == [f"checkpoint-{step:08d}" for step in (1, 3, 4)]
    for tensor in parameters_of(last).values():
        assert tensor.isfinite().all()


def test_ten_such_steps_in_a_row_stop_the_run(make_run):
    run = make_run(steps=40)
    with pytest.raises(TrainingError, match=r"step 12 .* like 9 before it.*checkpoint-00000002"):
        train(run, bad_steps=range(3, 40))
    assert len(log_rows(run)) == 11


def test_a_run_does_not_end_with_such_a_step(make_run):
    with pytest.raises(TrainingError, match=r"The loss of step 4 is inf"):
        train(make_run(), bad_steps={4})


# The moving average -------------------------------------------------------------------------------


def test_the_moving_average_follows_the_weights(make_run):
    run = make_run(ema_decay=0.75)
    start = {key: value.clone() for key, value in run.modules[PART].state_dict().items()}
    train(run)
    expected = start
    for step in range(1, 5):
        checkpoint = run.folder / f"checkpoint-{step:08d}"
        share = 1 - min(0.75, (1 + step) / (10 + step))
        for key, value in parameters_of(checkpoint).items():
            expected[key] = torch.lerp(expected[key], value, share)
        averages = parameters_of(checkpoint, checkpoints.EMA)
        for key, value in averages.items():
            assert torch.allclose(value, expected[key], atol=1e-6), key
    provenance = weights.read(checkpoint / checkpoints.EMA).metadata["provenance"]
    assert provenance.endswith("4 steps, moving average of 0.75")


def test_a_run_that_goes_on_has_the_same_average(make_run):
    whole = train(make_run("whole", ema_decay=0.75)).parent
    train(make_run("twice", ema_decay=0.75, steps=2))
    twice = train(make_run("twice", ema_decay=0.75)).parent
    for name in (checkpoints.WEIGHTS, checkpoints.EMA):
        assert equal(parameters_of(whole, name), parameters_of(twice, name))


def test_a_damaged_average_is_named(make_run, capsys):
    last = train(make_run(ema_decay=0.75)).parent
    (last / checkpoints.EMA).write_bytes(b"")
    train(make_run(ema_decay=0.75))
    said = capsys.readouterr().out
    assert "checkpoint-00000004 is damaged (ema.safetensors has other bytes" in said


def test_an_average_begins_with_the_weights_where_none_was_saved(tiny):
    module = nn.Linear(2, 2)
    average = MovingAverage({"x": module}, ["x"], 0.5)
    module.weight.data += 1
    average.load({})
    assert torch.equal(average.state_dicts()["x"]["weight"], module.weight)
    module.weight.data += 1
    assert not torch.equal(average.state_dicts()["x"]["weight"], module.weight)


def test_an_average_takes_the_place_of_the_weights_and_gives_it_back():
    module = nn.Linear(2, 2)
    average = MovingAverage({"x": module}, ["x"], 0.5)
    first = module.weight.detach().clone()
    module.weight.data += 1
    with pytest.raises(KeyError), average.in_place():
        assert torch.equal(module.weight, first)
        raise KeyError
    assert torch.equal(module.weight, first + 1)
    assert torch.equal(average.state_dicts()["x"]["weight"], first)


def test_convert_takes_the_average_where_it_is_asked_to(make_run, tmp_path):
    path = train(make_run(ema_decay=0.75, steps=1))
    words = [sys.executable, ROOT / "tools/convert.py", path, "--use-ema"]
    words += ["--cat-weights", tmp_path / "cat.safetensors"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = weights.read(tmp_path / "cat.safetensors").parts[PART]
    assert equal(written, parameters_of(path.parent, checkpoints.EMA))
    card = (tmp_path / "cat.md").read_text("utf-8")
    for line in (
        'license: "unknown"',
        f"| SHA-256 | `{identity.of_file(tmp_path / 'cat.safetensors')}` |",
        "1. **sem-inpainter**",
        "   - steps: 1 of 1, 1 samples",
        "   - data: cups.jsonl, 7 records of split train",
        "   - licence of the data: CC BY 2.0",
        "   - learning rates: sem_inpainter 0.0001",
        "   - moving average: 0.75",
        "   - held-out records: not measured",
    ):
        assert line in card.splitlines(), card
    (tmp_path / "cat.safetensors").unlink()
    done = subprocess.run(words, capture_output=True, text=True)
    assert "cat.md exists already and was not touched" in done.stderr
    (path.parent / checkpoints.EMA).unlink()
    done = subprocess.run([*words, "--overwrite"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--use-ema finds no ema.safetensors beside" in done.stderr


# Engines and weights ------------------------------------------------------------------------------


def test_8_bits_without_bitsandbytes_are_one_sentence(make_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as where it is not installed
    with pytest.raises(TrainingError, match=r"needs bitsandbytes.*pip install bitsandbytes"):
        train(make_run(use_8bit_adam=True))


def test_a_compiled_run_learns_the_same(make_run):
    plain = train(make_run("plain"))
    compiled = train(make_run("compiled", dynamo_backend="aot_eager"))
    values = parameters_of(plain.parent)
    for key, value in parameters_of(compiled.parent).items():
        assert torch.allclose(value, values[key], atol=1e-6), key


def test_min_snr_weighs_timesteps_as_written():
    alphas = stable_diffusion_schedule()
    snr = alphas / (1 - alphas)
    share = snr_weight(alphas, 5.0)
    assert (share[snr <= 5] == 1).all()
    assert torch.allclose(share[snr > 5], 5 / snr[snr > 5])

    def denoiser(x, timestep, context, visual_prompt):
        return torch.zeros_like(x[:, :4])

    generator = torch.Generator().manual_seed(0)
    batch = {
        "latent": torch.randn(3, 4, 2, 2, generator=generator),
        "noise": torch.randn(3, 4, 2, 2, generator=generator),
        "masked_latent": torch.zeros(3, 4, 2, 2),
        "latent_mask": torch.zeros(3, 1, 2, 2),
        "timestep": torch.tensor([0, 500, 999]),
        "context": torch.zeros(3, 1, 1),
        "teacher_patches": torch.zeros(3, 16, 2),
    }
    plain, _ = Diffusion(denoiser, alphas)(batch)
    weighed, _ = Diffusion(denoiser, alphas, snr_gamma=5.0)(batch)
    assert torch.allclose(weighed["noise"], plain["noise"] * share[batch["timestep"]])
    assert weighed["noise"][0] < plain["noise"][0]
