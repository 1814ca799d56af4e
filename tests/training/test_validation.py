"""A run measured on held-out records: the same ones, with the same chance, and no trace in it."""

import csv
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from paths import ROOT
from PIL import Image, ImageDraw

from cat_diffusion.cat_core import weights
from cat_diffusion.cat_core.data import manifest
from cat_diffusion.cat_core.data.manifest import ManifestError
from cat_diffusion.cat_core.models.sem_inpainter import SemInpainter
from cat_diffusion.cat_core.training import loop
from cat_diffusion.cat_core.training.objectives import combine
from cat_diffusion.cat_core.training.settings import Settings, TrainingError, TrainingRun
from cat_diffusion.cat_core.training.stages import STAGES
from cat_diffusion.cat_core.training.stores import FreshSamples
from cat_diffusion.cat_core.training.validation import losses, validation_batches

pytest.importorskip("accelerate")


@pytest.fixture
def data(tmp_path):
    """Four records to train on and three that are held out."""
    records = []
    for index in range(7):
        Image.new("RGB", (40, 32), (30 * index, 90, 200)).save(tmp_path / f"{index}.png")
        mask = Image.new("L", (40, 32))
        ImageDraw.Draw(mask).ellipse((4, 4, 20 + index, 24), fill=255)
        mask.save(tmp_path / f"{index}_mask.png")
        files = {"image": f"{index}.png", "mask": f"{index}_mask.png"}
        split = "train" if index < 4 else "validation"
        records.append(manifest.Record(f"r{index}", **files, label="cup", split=split))
    manifest.write(tmp_path / "manifest.jsonl", records)
    return tmp_path / "manifest.jsonl"


def train(tiny_file, data, run, *more):
    words = [sys.executable, ROOT / "tools/train.py", "sem-inpainter", "--base", tiny_file]
    words += ["--data", data, "--run", run, "--cpu", "--save-every", 2, "--batch-size", 2]
    words += ["--micro-batch-size", 2, "--samples-every", 0, *more]
    return subprocess.run(list(map(str, words)), capture_output=True, text=True)


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_held_out_records_are_measured_and_training_does_not_notice(tiny_file, data, tmp_path):
    more = ["--steps", 4, "--validate-every", 2, "--keep-best", "--patience", 3]
    done = train(tiny_file, data, tmp_path / "with", *more)
    assert done.returncode == 0, done.stderr
    best = tmp_path / "with/checkpoint-00000004/weights.safetensors"
    assert re.search(rf"Lowest validation loss, [\d.]+: {re.escape(str(best))}", done.stdout)
    measured = rows(tmp_path / "with/validation.csv")
    assert [row["step"] for row in measured] == ["2", "4"]
    assert float(measured[1]["loss"]) < float(measured[0]["loss"])
    assert measured[0]["cosine_observed"] == measured[1]["cosine_observed"]
    assert measured[0]["cosine"] != measured[1]["cosine"]
    assert train(tiny_file, data, tmp_path / "without", "--steps", 4).returncode == 0
    trained = [row["loss"] for row in rows(tmp_path / "with/log.csv")]
    assert trained == [row["loss"] for row in rows(tmp_path / "without/log.csv")]


def test_a_split_without_records_is_said_before_the_first_step(tiny_file, data, tmp_path):
    more = ["--steps", 2, "--validate-every", 1, "--validation-split", "test"]
    done = train(tiny_file, data, tmp_path / "run", *more)
    assert done.returncode == 1
    assert "There is nothing to validate on" in done.stderr
    assert not (tmp_path / "run/log.csv").exists()


class PlainEncoders:
    """Frozen networks of one number a picture."""

    def image(self, pixels):
        means = pixels.float().mean((1, 2, 3))
        return means.view(-1, 1, 1).expand(-1, 4, 2), means.view(-1, 1)

    def text(self, texts):
        return torch.tensor([[float(len(text))] for text in texts])


class PlainObjective(torch.nn.Module):
    """Judges pictures by their mean; what is watched is no number for some."""

    extra: dict = {"distance": 1.0}  # noqa: RUF012 - as objectives have it

    def __init__(self):
        super().__init__()
        self.value = torch.nn.Parameter(torch.zeros(()))

    def weights(self, batch):
        return {"distance": torch.ones(len(batch["image"]))}

    def forward(self, batch):
        assert not self.training
        means = batch["teacher_image"].flatten()
        return {"distance": means - self.value}, {"mean": means.where(means > 100, torch.nan)}


def test_the_loss_of_parts_is_the_loss_of_the_whole(data):
    records = manifest.read(data, "validation")
    fresh = FreshSamples(records, data.parent, PlainEncoders(), objective="distillation")
    parts = validation_batches(fresh, None, samples=64, micro_batch_size=2)
    (whole,) = validation_batches(fresh, None, samples=64, micro_batch_size=3)
    assert [len(part["image"]) for part in parts] == [2, 1]
    objective = PlainObjective()
    figures = losses(objective, parts)
    assert objective.training
    assert figures["loss"] == pytest.approx(losses(objective, [whole])["loss"])
    objective.eval()
    terms, _ = objective(whole)
    expected = combine(objective, terms, {"distance": torch.tensor(3.0)})
    assert figures["loss"] == pytest.approx(expected.item())
    means = whole["teacher_image"].flatten()
    assert figures["mean"] == pytest.approx(means[means > 100].mean().item())
    with pytest.raises(ManifestError, match="There is nothing to validate on"):
        empty = FreshSamples([], data.parent, PlainEncoders(), objective="distillation")
        validation_batches(empty, None, samples=64, micro_batch_size=2)


# Best checkpoint and early end --------------------------------------------------------------------


class FixedValidation:
    """Stands for held-out records whose losses are known by heart."""

    def __init__(self, losses_by_step):
        self.losses = losses_by_step
        self.measured = []

    def is_due(self, step, last):
        self.step = step
        return step in self.losses

    def measure(self, average):
        self.measured.append(self.step)
        loss = self.losses[self.step]
        return {"loss": loss, "ema_loss": 1 - loss} if average else {"loss": loss}


LOSSES = {1: 0.5, 2: 0.25, 3: float("nan"), 4: 0.75, 5: 0.5, 6: 0.5}


@pytest.fixture
def train_plain(tiny, tmp_path):
    """Train a tiny SemInpainter for some steps, judged by losses known by heart."""

    def train_plain(name="run", measured=LOSSES, **changes):
        _, architecture = tiny
        torch.manual_seed(0)
        module = SemInpainter(architecture.sem_inpainter)
        defaults = {"steps": 6, "batch_size": 1, "micro_batch_size": 1, "save_every": 1, "keep": 1}
        run = TrainingRun(
            STAGES["sem-inpainter"],
            {"sem_inpainter": module},
            DrawnObjective(module),
            Settings(**defaults | {"keep_best": True} | changes),
            folder=tmp_path / name,
            architecture=architecture,
        )
        validation = FixedValidation(measured)
        last = loop.train(run, one_target, cpu=True, validation=validation)
        return run.folder, validation.measured, last.parent.name

    return train_plain


class DrawnObjective(PlainObjective):
    """Draws the mean of a SemInpainter's weights to what the batch says."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def weights(self, batch):
        return {"distance": torch.ones(len(batch["target"]))}

    def forward(self, batch):
        total = sum(parameter.mean() for parameter in self.module.parameters())
        return {"distance": (total - batch["target"]) ** 2 + 0 * self.value}, {}


def one_target(step, positions):
    return {"target": torch.full((len(positions),), float(step))}


def checkpoints_in(folder):
    return sorted(int(path.name[-8:]) for path in folder.glob("checkpoint-*"))


def test_the_best_checkpoint_stays_beside_the_last_ones(train_plain):
    folder, _, _ = train_plain()
    assert checkpoints_in(folder) == [2, 6]
    best = json.loads((folder / "best.json").read_text())
    assert best == {
        "checkpoint": "checkpoint-00000002",
        "file": "weights.safetensors",
        "step": 2,
        "validation_loss": 0.25,
    }
    weights.read(folder / best["checkpoint"] / "weights.safetensors").require("sem_inpainter")
    folder, _, _ = train_plain("plain", keep_best=False)
    assert checkpoints_in(folder) == [6]
    assert not (folder / "best.json").exists()


def test_the_average_is_judged_where_there_is_one(train_plain):
    folder, _, _ = train_plain(ema_decay=0.5)
    best = json.loads((folder / "best.json").read_text())
    assert (best["step"], best["file"]) == (4, "ema.safetensors")
    assert [row["ema_loss"] for row in rows(folder / "validation.csv")][:2] == ["0.5", "0.75"]


def test_a_file_that_knows_no_averages_goes_on_by_the_weights_own_losses(train_plain):
    """As versions began it that measured nothing else."""
    falling = {step: 1 - step / 10 for step in range(1, 7)}
    folder, _, _ = train_plain(ema_decay=0.5, patience=2, steps=3, measured=falling)
    lines = (folder / "validation.csv").read_text().splitlines()
    (folder / "validation.csv").write_text(
        "".join(f"{line.rpartition(',')[0]}\n" for line in lines)
    )
    folder, measured, _ = train_plain(ema_decay=0.5, patience=2, measured=falling)
    assert measured == [4, 5, 6]
    best = json.loads((folder / "best.json").read_text())
    assert (best["step"], best["file"]) == (6, "weights.safetensors")


def test_a_better_step_is_kept_even_where_none_was_to_be_saved(train_plain):
    folder, _, _ = train_plain(save_every=100)
    assert checkpoints_in(folder) == [2, 6]


def test_a_run_that_goes_on_knows_its_best_step(train_plain):
    train_plain("twice", steps=4)
    folder, measured, _ = train_plain("twice")
    assert measured == [5, 6]
    assert checkpoints_in(folder) == [2, 6]
    whole, _, _ = train_plain("whole")
    for name in ("validation.csv", "best.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_lines_after_the_newest_checkpoint_are_measured_again(train_plain):
    folder, _, _ = train_plain(steps=4, keep=9)
    shutil.rmtree(folder / "checkpoint-00000003")
    shutil.rmtree(folder / "checkpoint-00000004")
    (folder / "checkpoint-00000002/weights.safetensors").write_bytes(b"")
    _, measured, _ = train_plain(measured=LOSSES | {2: 0.375})
    assert measured == [2, 3, 4, 5, 6]
    assert [row["step"] for row in rows(folder / "validation.csv")] == list("123456")
    assert json.loads((folder / "best.json").read_text())["validation_loss"] == 0.375


def test_a_run_ends_when_patience_does_and_stays_ended(train_plain, capsys):
    folder, measured, last = train_plain(patience=2, save_every=100)
    assert measured == [1, 2, 3, 4]
    assert last == "checkpoint-00000004"
    assert checkpoints_in(folder) == [2, 4]
    assert "The last 2 validations were no better than one before" in capsys.readouterr().out
    _, measured, last = train_plain(patience=2, save_every=100)
    assert (measured, last) == ([], "checkpoint-00000004")
    assert "the run ends after step 4" in capsys.readouterr().out.replace("\n", " ")
    _, measured, last = train_plain(patience=9, save_every=100)
    assert (measured, last) == ([5, 6], "checkpoint-00000006")


def test_what_judges_needs_records_to_judge_by(tiny_file, data, tmp_path):
    done = train(tiny_file, data, tmp_path / "run", "--keep-best")
    assert done.returncode == 2
    assert "--keep-best judges by held-out records: give --validate-every" in done.stderr
    done = train(tiny_file, data, tmp_path / "run", "--patience", 2)
    assert "--patience judges by held-out records" in done.stderr


# Trackers -----------------------------------------------------------------------------------------


def test_tensorboard_has_each_step_once_after_a_run_that_went_on(train_plain):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _, _ = train_plain(report_to="tensorboard", steps=4, keep=9)
    for step in (3, 4):
        shutil.rmtree(folder / f"checkpoint-{step:08d}")
    train_plain(report_to="tensorboard")
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    logged = events.Scalars("loss")
    assert [event.step for event in logged] == [1, 2, 3, 4, 5, 6]
    written = [float(row["loss"]) for row in rows(folder / "log.csv")]
    assert [event.value for event in logged] == pytest.approx(written)
    validated = {event.step: event.value for event in events.Scalars("validation/loss")}
    assert validated == pytest.approx(LOSSES, nan_ok=True)


def test_wandb_goes_on_with_the_same_run(train_plain, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder, _, _ = train_plain(report_to="wandb", steps=4)
    number = (folder / "wandb-run.txt").read_text()
    train_plain(report_to="wandb")
    assert (folder / "wandb-run.txt").read_text() == number
    runs = [path.name.rpartition("-")[2] for path in (folder / "wandb").glob("offline-run-*")]
    assert runs == [number, number]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_one_sentence(train_plain, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)  # as where it is not installed
    with pytest.raises(TrainingError, match=rf"--report-to {name} needs {name}.*pip install"):
        train_plain(report_to=name)


def test_fp16_without_a_gpu_is_one_sentence(train_plain):
    with pytest.raises(TrainingError, match="--precision fp16 needs a GPU, and there is none"):
        train_plain(precision="fp16")
