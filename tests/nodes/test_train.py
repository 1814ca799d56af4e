"""The training nodes in the real host: what they learn, what they write, and what they leave alone."""

import dataclasses
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

pytest.importorskip("accelerate")

SEM = dict(folder="things", steps=6, batch_size=4, learning_rate=1e-3, masked_loss=False, precision="fp32", seed=0,
           filename_prefix="sem", licence="CC0")
REF = dict(folder="things", size=64, steps=3, batch_size=2, micro_batch_size=1, checkpointing=False, learning_rate=1e-3,
           precision="fp32", seed=0, filename_prefix="ref", licence="CC0")


def examples(folder, count=4):
    """Triples of both kinds."""
    folder.mkdir(parents=True)
    for i in range(count):
        picture = np.random.default_rng(i).integers(0, 255, (40, 48, 3), np.uint8)
        mask = Image.new("L", (48, 40))
        ImageDraw.Draw(mask).ellipse((8 + i, 8, 30 + i, 32), fill=255)
        name, suffix = (f"red_cup_{i}", "_image") if i % 2 else (f"p{i}", "")
        Image.fromarray(picture).save(folder / f"{name}{suffix}.png")
        mask.save(folder / f"{name}_mask.png")
        if not suffix:
            (folder / f"{name}.txt").write_text("spoon")


@pytest.fixture
def place(pack, monkeypatch, tmp_path):
    """ComfyUI's folders, with four examples in input/things."""
    import folder_paths

    for name in ("input", "temp"):
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "cat_diffusion", ([str(tmp_path / "models")], {".safetensors"}))
    examples(tmp_path / "input/things")
    return tmp_path


@pytest.fixture
def nodes(pack):
    from cat_diffusion.nodes import train

    return train


@pytest.fixture
def sem(nodes, models, place):
    def sem(cat_model=None, **changes):
        return nodes.CATTrainSemInpainter.execute(models.clip_vision, models.clip, **{**SEM, **changes}, cat_model=cat_model).args

    return sem


@pytest.fixture
def ref(nodes, models, place):
    def ref(cat_model=None, model=None, **changes):
        return nodes.CATTrainRefAdapter.execute(model or models.model, models.clip_vision, models.clip, models.vae,
                                                **{**REF, **changes}, cat_model=cat_model).args

    return ref


def test_sem(sem, place, host):
    cat_model, plot = sem()
    print(cat_model, plot.shape)


def test_ref(ref, place, host):
    cat_model, plot = ref()
    print(cat_model, plot.shape)
