"""Small sets of scenes and result folders, and an open_clip model with random weights."""

import json

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cat_diffusion.cat_core.evaluation.results import SampleSet
from demo_model import scenes

SIZE = 64  # pixels

TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="session")
def scene_manifest(tmp_path_factory):
    """The manifest of eight drawn scenes."""
    return scenes.write(tmp_path_factory.mktemp("scenes"), scenes.TEST[:8], SIZE)


@pytest.fixture
def result_folder(scene_manifest, tmp_path):
    """Make a folder of results.

    paint(picture, hole, place) -> finished picture, all size x size.
    """

    def make(name="results", paint=original, hole="segment", **run):
        folder = tmp_path / name
        folder.mkdir()
        samples = SampleSet(scene_manifest, "test", hole, SIZE).read()
        write_pictures(folder, samples, paint)
        write_run(folder, samples, **{"workflow": f"{name}.json", **run})
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """A folder that open_clip reads as local-dir: a tiny model with random weights."""
    folder = tmp_path_factory.mktemp("open_clip")
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": TINY_CLIP, "preprocess_cfg": {}})
    )
    torch.manual_seed(3)
    save_file(open_clip.CLIP(**TINY_CLIP).state_dict(), folder / "open_clip_model.safetensors")
    return folder


def write_pictures(folder, samples, paint):
    for place, sample in enumerate(map(samples.sample, samples.records)):
        paint(sample.picture, sample.hole, place).save(folder / f"{sample.record.id}.png")


def write_run(folder, samples, **run):
    told = {
        "manifest": str(samples.manifest),
        "split": samples.split,
        "hole": samples.hole,
        "size": samples.size,
        "seed": 0,
    }
    (folder / "run.json").write_text(json.dumps(told | run))


def original(picture, hole, place):
    return picture


def grey(picture, hole, place):
    """Fills the hole with a grey of its own."""
    return Image.composite(Image.new("RGB", picture.size, (100 + place,) * 3), picture, hole)
