"""Networks that make features: against direct use of their libraries, and what they refuse."""

import json
import pickle
import sys

import numpy as np
import open_clip
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from cat_diffusion.cat_core.evaluation import metrics
from cat_diffusion.cat_core.evaluation.extractors import (
    FeatureFile,
    Inception,
    OpenClip,
    downloaded,
)
from cat_diffusion.cat_core.evaluation.metrics import EvaluationError, Missing

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    pictures = []
    for side in (3, 5, 9):
        noise = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
        pictures.append(noise.resize((70, 50)))
    return pictures


def test_a_feature_file_returns_what_went_in():
    features = torch.randn(100, 6)
    file = FeatureFile()
    for batch in features.split(33):
        file.append(batch)
    assert torch.equal(torch.cat(list(file.batches(size=7))), features)
    rows = np.array([5, 99, 5, 0])
    assert torch.equal(torch.cat(list(file.batches(rows, size=3))), features[[0, 5, 5, 99]])
    file.append(features[:1])
    assert (file.count, file.width) == (101, 6)
    assert len(torch.cat(list(file.batches()))) == 101


# open_clip ----------------------------------------------------------------------------------------


def test_clip_score_equals_open_clip(tiny_clip, pictures):
    labels = ["red star", "fire hydrant", "a cup"]
    clip = OpenClip(f"local-dir:{tiny_clip}", None, CPU)
    found = metrics.clip_score(clip.image(pictures), clip.text(labels))

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tiny_clip}")
    model.eval()
    with torch.no_grad():
        pixels = torch.stack(list(map(preprocess, pictures)))
        image = model.encode_image(pixels, normalize=True)
        text = model.encode_text(open_clip.tokenize(labels), normalize=True)
    expected = 100 * (image * text).sum(1).clamp(min=0)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert expected.max() > 1
    other = metrics.clip_score(clip.image(pictures), clip.text(labels[::-1]))
    assert not torch.allclose(found, other)


def test_a_weights_file_is_loaded_into_the_named_model(tiny_clip, pictures, tmp_path):
    open_clip.add_model_config(_config(tiny_clip, tmp_path))
    weights = tiny_clip / "open_clip_model.safetensors"
    by_file = OpenClip("tiny-for-tests", str(weights), CPU)
    by_folder = OpenClip(f"local-dir:{tiny_clip}", None, CPU)
    assert torch.equal(by_file.image(pictures), by_folder.image(pictures))
    (tmp_path / "broken.pt").write_bytes(b"not weights")
    for name, file in (
        ("tiny-for-tests", tmp_path / "broken.pt"),
        ("ViT-B-32", weights),
        ("no-such-model", weights),
    ):
        with pytest.raises(
            EvaluationError, match=rf"open_clip cannot make {name} of .*Give MODEL:FILE"
        ):
            OpenClip(name, str(file), CPU)


def _config(tiny_clip, folder):
    described = json.loads((tiny_clip / "open_clip_config.json").read_text())
    (folder / "tiny-for-tests.json").write_text(json.dumps(described["model_cfg"]))
    return folder / "tiny-for-tests.json"


def test_tags_are_looked_up_on_this_machine_only(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        Missing,
        match=r"laion400m_e32 of ViT-B-32 are not in .* nothing is downloaded here. Download",
    ):
        OpenClip("ViT-B-32", "laion400m_e32", CPU)
    with pytest.raises(
        EvaluationError, match=r"no_such_tag is neither a file nor a tag .*laion400m_e32"
    ):
        OpenClip("ViT-B-32", "no_such_tag", CPU)
    with pytest.raises(EvaluationError, match=r"has no model ViT-X"):
        OpenClip("ViT-X", "openai", CPU)
    assert not list(tmp_path.iterdir())
    told = open_clip.get_pretrained_cfg("ViT-B-32-quickgelu", "openai")
    repository = tmp_path / f"models--{told['hf_hub'].strip('/').replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("abc")
    (repository / "snapshots/abc").mkdir(parents=True)
    (repository / "snapshots/abc/open_clip_model.safetensors").touch()
    path, settings = downloaded(open_clip, "ViT-B-32-quickgelu", "openai")
    assert path == str(repository / "snapshots/abc/open_clip_model.safetensors")
    assert settings["force_quick_gelu"]
    assert settings["image_mean"] == open_clip.OPENAI_DATASET_MEAN


def test_open_clip_may_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(Missing, match=r"open_clip is not installed .*requirements-evaluate.txt"):
        OpenClip("ViT-B-32", "openai", CPU)


# Inception ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """torch-fidelity's file with random weights in it."""
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: None)
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path))
    for name, weight in network.named_parameters():
        if name.endswith("conv.weight"):
            # He's initialisation, so that features do not die out on the way.
            weight.mul_(6**0.5)
    torch.save(network.state_dict(), path)
    return path, network


def test_inception_features(inception_file, pictures):
    path, network = inception_file
    found = Inception(path, CPU)(pictures[:2])
    resized = []
    for picture in pictures[:2]:
        resized.append(np.array(picture.resize((299, 299), Image.Resampling.BICUBIC)))
    with torch.no_grad():
        (expected,) = network(torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2))
    assert found.shape == (2, 2048)
    apart = (expected[0] - expected[1]).abs().max()
    assert (found - expected).abs().max() < 0.01 * apart


def test_inception_refuses_other_files(tmp_path, monkeypatch):
    marker = tmp_path / "ran"

    class Hostile:
        def __reduce__(self):
            return open, (str(marker), "w")

    with pytest.raises(EvaluationError, match=r"none.pth is not a file, expected torch-fidelity's"):
        Inception(tmp_path / "none.pth", CPU)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "hostile.pth").write_bytes(pickle.dumps(Hostile()))
    (tmp_path / "text.pth").write_bytes(b"<html>404</html>")
    for name in ("other", "hostile", "text"):
        with pytest.raises(
            EvaluationError, match=rf"{name}.pth is not torch-fidelity's Inception file"
        ):
            Inception(tmp_path / f"{name}.pth", CPU)
    assert not marker.exists()
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(Missing, match=r"torchmetrics and torch-fidelity"):
        Inception(tmp_path / "other.pth", CPU)
