"""A run measured on held-out records: the same ones, with the same chance, and no trace in it."""

import csv
import subprocess
import sys

import pytest
import torch
from paths import ROOT
from PIL import Image, ImageDraw

from cat_diffusion.cat_core.data import manifest
from cat_diffusion.cat_core.data.manifest import ManifestError
from cat_diffusion.cat_core.training.objectives import combine
from cat_diffusion.cat_core.training.stores import FreshSamples
from training.validation import losses, validation_batches

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
    more = ["--steps", 4, "--validate-every", 2]
    done = train(tiny_file, data, tmp_path / "with", *more)
    assert done.returncode == 0, done.stderr
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
