"""The one command that makes the demo model, with very few steps; its objectives; its latents."""

import csv
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from paths import ROOT
from torch.nn import functional as F

from cat_diffusion.cat_core import preprocess, weights
from demo_model import networks, pretraining, score

pytest.importorskip("accelerate")
pytestmark = pytest.mark.full

STAGES = ["clip", "vae", "sem-inpainter", "unet", "ref-adapter-unet", "cascade"]


@dataclass
class Made:
    """What the command wrote, and the command."""

    folder: Path
    command: list

    @property
    def checkpoint(self):
        return self.folder / "demo.safetensors"

    def stamps(self):
        """When each of the files of weights was written."""
        paths = (self.folder / "work").rglob("weights.safetensors")
        return {path: path.stat().st_mtime_ns for path in paths}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, ROOT / "tools/run.py", "demo_model.recipe"]
    command += ["--work", folder / "work", "--out", folder / "demo.safetensors"]
    command += ["--shorter", "400", "--cpu"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    return Made(folder, command)


def test_one_command_makes_a_checkpoint_that_loads(made):
    assert set(weights.PREFIXES) == set(weights.read(made.checkpoint).parts)
    assert len(score.load(made.checkpoint)) == 5
    with open(made.folder / "demo.log.csv", newline="") as file:
        stages = [line[0] for line in csv.reader(file)]
    assert list(dict.fromkeys(stages)) == ["stage", *STAGES]


def test_what_is_done_is_not_done_again(made):
    before = made.stamps()
    assert subprocess.run(made.command, capture_output=True).returncode == 0
    assert made.stamps() == before


def test_scaled_latents_are_standard_and_reconstruct_the_same():
    generator = torch.Generator().manual_seed(0)
    vae = networks.networks(generator)["vae"].eval()
    pictures = torch.rand(4, 3, 64, 64, generator=generator) * 2 - 1
    with torch.no_grad():
        vae.quant_conv.bias.normal_(generator=generator)
        latent = vae.quant_conv(vae.encoder(pictures))[:, :4]
        before = vae.decoder(vae.post_quant_conv(latent))
        networks.scale_latents(vae, latent)
        scaled_latent = vae.quant_conv(vae.encoder(pictures))[:, :4]
        after = vae.decoder(vae.post_quant_conv(scaled_latent))
    seen_by_unet = scaled_latent * networks.LATENT_SCALE
    assert seen_by_unet.mean((0, 2, 3)).abs().max() < 1e-4
    assert (seen_by_unet.std((0, 2, 3)) - 1).abs().max() < 1e-4
    assert (after - before).abs().max() < 1e-4


def tokenize(texts):
    """Any numbers that differ from word to word, and the end token after them."""
    ids = torch.full((len(texts), 77), 49407)
    for row, text in enumerate(texts):
        for place, word in enumerate(text.split()):
            ids[row, place] = sum(map(ord, word))
    return ids


def test_clip_is_judged_on_every_object_that_shows():
    """Terms against sums over pictures and objects, written out."""
    parts = networks.networks(torch.Generator().manual_seed(0))
    vision = parts["clip_vision"]
    label_tokens = tokenize(pretraining.LABELS)
    objective = pretraining.Contrastive(parts["clip_text"], vision, label_tokens)
    batch = pretraining.clip_source(tokenize, 3, 0)(0, range(3))
    with torch.no_grad():
        terms, _ = objective(batch)
        hidden = vision(preprocess.clip_normalise(batch["pixels"]))[0][:, 1:]
        # The host's own forward pass, all 77 tokens, not projected.
        texts = parts["clip_text"](label_tokens)[3]

        def losses(features, label):
            """Surprise at an object's label, of features (N, D)."""
            projected = vision.visual_projection(vision.vision_model.post_layernorm(features))
            logits = 20 * F.normalize(projected, dim=-1) @ F.normalize(texts, dim=1).T
            return F.cross_entropy(logits, label.expand(len(features)))

        for row in range(3):
            object_losses = []
            patch_losses = []
            shows = batch["object_mask"][row] > 0
            for label, mask in zip(batch["label"][row], shows, strict=True):
                if label >= 0:
                    patches = hidden[row][mask]
                    object_losses.append(losses(patches.mean(0, keepdim=True), label).item())
                    patch_losses.append(losses(patches, label).item())
            assert len(object_losses) >= 2
            assert terms["objects"][row] == pytest.approx(mean(object_losses), rel=1e-4)
            assert terms["patches"][row] == pytest.approx(mean(patch_losses), rel=1e-4)


def mean(numbers):
    return sum(numbers) / len(numbers)
