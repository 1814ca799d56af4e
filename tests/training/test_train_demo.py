"""The one command that makes the demo model, with very few steps; its parts' objectives and the fold of the latents."""

import csv
import subprocess
import sys

import pytest
import torch
from paths import ROOT

pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    command = [
        sys.executable,
        ROOT / "tools/run.py",
        "demo_model.recipe",
        "--work",
        folder / "work",
        "--out",
        folder / "demo.safetensors",
        "--shorter",
        "400",
        "--cpu",
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    return folder, command


def test_one_command_makes_a_checkpoint_that_loads(made, pack):
    from cat_diffusion.cat_core import weights
    from demo_model import score

    folder, _ = made
    assert set(weights.PREFIXES) == set(weights.read(folder / "demo.safetensors").parts)
    assert len(score.load(folder / "demo.safetensors")) == 5
    with open(folder / "demo.log.csv", newline="") as file:
        stages = [row[0] for row in csv.reader(file)]
    assert list(dict.fromkeys(stages)) == [
        "stage",
        "clip",
        "vae",
        "sem-inpainter",
        "unet",
        "ref-adapter-unet",
        "cascade",
    ]


def test_what_is_done_is_not_done_again(made):
    folder, command = made
    before = {
        path: path.stat().st_mtime_ns for path in (folder / "work").rglob("weights.safetensors")
    }
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert before == {
        path: path.stat().st_mtime_ns for path in (folder / "work").rglob("weights.safetensors")
    }


def test_scaled_latents_are_standard_and_reconstruct_the_same(pack):
    from demo_model import networks

    generator = torch.Generator().manual_seed(0)
    vae = networks.networks(generator)["vae"].eval()
    pictures = torch.rand(4, 3, 64, 64, generator=generator) * 2 - 1
    with torch.no_grad():
        vae.quant_conv.bias.normal_(generator=generator)
        latent = vae.quant_conv(vae.encoder(pictures))[:, :4]
        before = vae.decoder(vae.post_quant_conv(latent))
        networks.scale_latents(vae, latent)
        after = vae.quant_conv(vae.encoder(pictures))[:, :4]
        again = vae.decoder(vae.post_quant_conv(after))
    scaled = after * networks.LATENT_SCALE
    assert (
        scaled.mean((0, 2, 3)).abs().max() < 1e-4 and (scaled.std((0, 2, 3)) - 1).abs().max() < 1e-4
    )
    assert (again - before).abs().max() < 1e-4


def test_clip_is_judged_on_every_object_that_shows(pack):
    """Terms against sums over pictures and objects, written out."""
    from torch.nn import functional as F

    from cat_diffusion.cat_core import preprocess
    from demo_model import networks
    from demo_model import pretraining as pretraining

    parts = networks.networks(torch.Generator().manual_seed(0))

    def tokenize(texts):
        ids = torch.full((len(texts), 77), 49407)
        for row, text in enumerate(texts):
            ids[row, : len(text.split())] = torch.tensor(
                [sum(map(ord, word)) for word in text.split()]
            )
        return ids

    objective = pretraining.Contrastive(
        parts["clip_text"], parts["clip_vision"], tokenize(pretraining.LABELS)
    )
    batch = pretraining.clip_source(tokenize, 3, 0)(0, range(3))
    with torch.no_grad():
        terms, watched = objective(batch)
        hidden = parts["clip_vision"](preprocess.clip_normalise(batch["pixels"]))[0][:, 1:]
        texts = parts["clip_text"](tokenize(pretraining.LABELS))[
            3
        ]  # the host's own forward pass, all 77 tokens, not projected

        def logits(x):
            vision = parts["clip_vision"]
            x = vision.visual_projection(vision.vision_model.post_layernorm(x))
            return 20 * F.normalize(x, dim=-1) @ F.normalize(texts, dim=1).T

        for row in range(3):
            objects, patches = [], []
            for place in range(4):
                label, mask = batch["label"][row, place], batch["object_mask"][row, place] > 0
                if label >= 0:
                    objects.append(F.cross_entropy(logits(hidden[row][mask].mean(0)), label))
                    patches.append(
                        F.cross_entropy(logits(hidden[row][mask]), label.expand(int(mask.sum())))
                    )
            assert len(objects) >= 2
            assert terms["objects"][row] == pytest.approx(
                torch.stack(objects).mean().item(), rel=1e-4
            )
            assert terms["patches"][row] == pytest.approx(
                torch.stack(patches).mean().item(), rel=1e-4
            )
