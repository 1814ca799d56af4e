"""tools/generate.py with methods of its own process: functions, and pipelines of diffusers."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import generate
import numpy as np
import pytest
import torch
from conftest import SIZE
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline
from paths import ROOT
from PIL import Image
from tiny_pipeline import tiny_parts

from cat_diffusion.cat_core.evaluation.results import SampleSet
from evaluation.sample_checks import sample_seed

FILL = """
import numpy as np
import torch
from PIL import Image

def fill(image, mask, text, generator):
    shade = torch.randint(0, 256, (3,), generator=generator)
    return Image.new("RGB", image.size, tuple(shade.tolist()))

def slow(image, mask, text, generator):
    import time
    time.sleep(0.15)
    return fill(image, mask, text, generator)

def odd(image, mask, text, generator):
    made = np.zeros((image.height, image.width, 3), np.uint8)
    kind = odd.calls = odd.calls + 1
    if kind == 1:
        return made.astype(np.float32)
    if kind == 2:
        return Image.new("RGB", (32, 64))
    if kind == 3:
        raise ValueError("no idea\\nsecond line")
    if kind == 4:
        return None
    if kind == 5:
        return torch.zeros(3, 64, 64)
    return made
odd.calls = 0
"""


@pytest.fixture
def method_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILL)
    return path


@pytest.fixture
def make(scene_manifest, monkeypatch, capsys):
    """Run the tool in this process: (exit code, what it printed, what it complained about)."""

    def make(method, out, *options, code=0):
        words = ["generate.py", "--method", method, "--manifest", scene_manifest]
        words += ["--size", SIZE, "--hole", "box", "--out", out, "--cpu", *options]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        try:
            found = generate.main()
        except SystemExit as error:
            found = error.code
        printed = capsys.readouterr()
        assert found == code, printed.err
        return printed.out + printed.err

    return make


def samples_of(scene_manifest, hole="box"):
    samples = SampleSet(scene_manifest, "test", hole, SIZE).read()
    return list(map(samples.sample, samples.records))


def levels(picture):
    return np.asarray(picture).astype(int)


def test_a_function_fills_the_holes(make, method_file, scene_manifest, tmp_path):
    make(f"python:{method_file}:fill", tmp_path / "out", "--seed", 5)
    make(f"python:{method_file}:fill", tmp_path / "made", "--seed", 5, "--background", "made")
    for sample in samples_of(scene_manifest):
        generator = torch.Generator().manual_seed(sample_seed(5, sample.record.id))
        shade = torch.randint(0, 256, (3,), generator=generator).numpy()
        hole = np.asarray(sample.hole)
        made = levels(Image.open(tmp_path / "out" / f"{sample.record.id}.png"))
        assert (made[hole == 0] == levels(sample.picture)[hole == 0]).all()
        assert (made[hole == 255] == shade).all()
        assert (levels(Image.open(tmp_path / "made" / f"{sample.record.id}.png")) == shade).all()
        about = json.loads((tmp_path / "out" / f"{sample.record.id}.json").read_text())
        assert about["method"] == "python:mine.py:fill"
        assert about["label"] == sample.record.label
        assert about["seconds"] > 0
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert run == run | {"hole": "box", "size": SIZE, "background": "photo", "prompt": "{label}"}
    assert len(run["method_sha256"]) == 64
    # Another content of the file is another run.
    method_file.write_text(FILL + "\n")
    said = make(f"python:{method_file}:fill", tmp_path / "out", "--seed", 5, code=1)
    assert "holds a run with method_sha256" in said


def test_what_a_function_does_wrong_is_named(make, method_file, tmp_path):
    said = make(f"python:{method_file}:odd", tmp_path / "out")
    assert "8 samples: 3 kept, 5 skipped" in said
    lines = (tmp_path / "out/failed.jsonl").read_text().splitlines()
    failed = [(line["reason"], line["detail"]) for line in map(json.loads, lines)]
    name = "python:mine.py:odd"
    expected = "expected a Pillow picture or an array (H, W, 3) of uint8"
    assert failed == [
        ("no picture", f"{name} returned a ndarray of float32 ({SIZE}, {SIZE}, 3), {expected}"),
        ("wrong size", f"{name} made 32x64 pixels, expected {SIZE}x{SIZE}"),
        ("error in odd", "ValueError: no idea"),
        ("no picture", f"{name} returned a NoneType, {expected}"),
        ("no picture", f"{name} returned a Tensor of torch.float32 (3, 64, 64), {expected}"),
    ]
    assert len(list((tmp_path / "out").glob("*.png"))) == 3


def test_a_killed_run_goes_on(make, method_file, scene_manifest, tmp_path):
    command = [sys.executable, ROOT / "tools/generate.py", "--manifest", scene_manifest]
    command += ["--method", f"python:{method_file}:slow", "--size", str(SIZE), "--hole", "box"]
    out = tmp_path / "killed"
    run = subprocess.Popen([*command, "--out", out], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while len(list(out.glob("*.json"))) < 4:
        assert run.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    run.kill()
    run.wait()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert 2 < len(kept) < 8
    make(f"python:{method_file}:slow", out)
    make(f"python:{method_file}:slow", tmp_path / "whole", "--batch-size", 3)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("*.png")}
    assert {path.name: path.read_bytes() for path in out.glob("*.png")} == whole
    finished = [path for path in kept if path.with_suffix(".json").exists()]
    assert sum(path.stat().st_mtime_ns == kept[path] for path in finished) >= len(kept) - 1


# Pipelines of diffusers ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_pipeline(tmp_path_factory):
    """The folder of Stable Diffusion Inpainting with tiny random networks."""
    folder = tmp_path_factory.mktemp("pipeline")
    StableDiffusionInpaintPipeline(
        **tiny_parts(9, SIZE), requires_safety_checker=False
    ).save_pretrained(folder)
    return folder


def test_a_pipeline_is_called_as_its_documents_say(make, tiny_pipeline, scene_manifest, tmp_path):
    options = ["--steps", 3, "--guidance", 4, "--prompt", "a photo of a {label}"]
    out = tmp_path / "out"
    make(f"diffusers:{tiny_pipeline}", out, *options, "--batch-size", 3)
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(tiny_pipeline)
    pipeline.set_progress_bar_config(disable=True)
    for sample in samples_of(scene_manifest)[:4]:
        expected = pipeline(
            prompt=f"a photo of a {sample.record.label}",
            image=sample.picture,
            mask_image=sample.hole,
            height=SIZE,
            width=SIZE,
            num_inference_steps=3,
            guidance_scale=4.0,
            strength=1.0,
            generator=torch.Generator().manual_seed(sample_seed(0, sample.record.id)),
        ).images[0]
        expected = Image.composite(expected, sample.picture, sample.hole)
        made = levels(Image.open(out / f"{sample.record.id}.png"))
        assert np.abs(made - levels(expected)).max() <= 2
        assert np.abs(made - levels(sample.picture)).max() > 20
    run = json.loads((out / "run.json").read_text())
    common = {"method": "diffusers:StableDiffusionInpaintPipeline", "dtype": "float32"}
    assert run == run | common | {
        "steps": 3,
        "guidance": 4.0,
        "model": f"diffusers:{tiny_pipeline}",
    }
    said = make(f"diffusers:{tiny_pipeline}", out, *options[2:], code=1)
    assert "holds a run with steps 3, not None" in said


def test_blended_latent_diffusion_is_its_authors_loop(make, scene_manifest, tmp_path):
    """Step by step, with the photo's noised latents outside the hole; then the decoder's fit."""
    folder = tmp_path / "sd"
    StableDiffusionPipeline(**tiny_parts(4, SIZE), requires_safety_checker=False).save_pretrained(
        folder
    )
    options = ["--steps", 8, "--background", "made"]
    make(f"blended-latent:{folder}", tmp_path / "plain", *options, "--decoder-steps", 0)
    make(f"blended-latent:{folder}", tmp_path / "fitted", *options, "--decoder-steps", 20)

    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    vae = pipeline.vae
    sample = samples_of(scene_manifest)[0]
    photo = torch.from_numpy(np.array(sample.picture)).movedim(2, 0)[None] / 127.5 - 1
    cells = np.array(sample.hole.resize((SIZE // 8, SIZE // 8), Image.Resampling.NEAREST))
    mask = torch.from_numpy(cells >= 128).float()
    tokens = pipeline.tokenizer(
        ["", sample.record.label], padding="max_length", truncation=True, return_tensors="pt"
    )
    generator = torch.Generator().manual_seed(sample_seed(0, sample.record.id))
    alphas = pipeline.scheduler.alphas_cumprod
    with torch.no_grad():
        context = pipeline.text_encoder(tokens.input_ids)[0]
        source = vae.encode(photo).latent_dist.mean * vae.config.scaling_factor
        latents = torch.randn(source.shape, generator=generator)
        # Eight steps are the times 876, 751, ... 1; the first two are left out.
        for t in range(626, 0, -125):
            noise = pipeline.unet(torch.cat((latents, latents)), t, context).sample
            guided = noise[:1] + 7.5 * (noise[1:] - noise[:1])
            now = alphas[t]
            then = alphas[max(t - 125, 0)]
            clean = (latents - (1 - now) ** 0.5 * guided) / now**0.5
            latents = then**0.5 * clean + (1 - then) ** 0.5 * guided
            fresh = torch.randn(source.shape, generator=generator)
            noised = now**0.5 * source + (1 - now) ** 0.5 * fresh
            latents = latents * mask + noised * (1 - mask)
        decoded = vae.decode(latents / vae.config.scaling_factor).sample
    expected = ((decoded[0] / 2 + 0.5).clamp(0, 1) * 255).round().movedim(0, 2).numpy()
    plain = levels(Image.open(tmp_path / "plain" / f"{sample.record.id}.png"))
    assert np.abs(plain - expected).max() <= 2

    fitted = levels(Image.open(tmp_path / "fitted" / f"{sample.record.id}.png"))
    outside = np.asarray(sample.hole) == 0
    original = levels(sample.picture)[outside]
    errors = [np.square(made[outside] - original).mean() for made in (plain, fitted)]
    assert errors[1] < 0.9 * errors[0]
    run = json.loads((tmp_path / "fitted/run.json").read_text())
    assert run == run | {"method": "blended-latent", "steps": 8, "decoder_steps": 20}
    inpainting = tmp_path / "inpainting"
    StableDiffusionInpaintPipeline(
        **tiny_parts(9, SIZE), requires_safety_checker=False
    ).save_pretrained(inpainting)
    said = make(f"blended-latent:{inpainting}", tmp_path / "nine", code=1)
    assert "takes 9 channels, so it is no plain Stable Diffusion; expected 4" in said


def test_a_pipeline_that_cannot_be_had_is_explained(make, tiny_pipeline, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    said = make("diffusers:nobody/none", out, code=1)
    assert "nobody/none is no folder here and cannot be had from Hugging Face (" in said
    assert "Check the name and the network, or give the folder" in said
    said = make(f"diffusers:{tmp_path}", out, code=1)
    assert "has no model_index.json; expected the folder of a diffusers pipeline" in said
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model_index.json").write_text('{"_class_name": "StableDiffusionInpaintPipeline"}')
    assert "diffusers cannot load" in make(f"diffusers:{broken}", out, code=1)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    said = make(f"diffusers:{tiny_pipeline}", out, code=1)
    assert "diffusers cannot be imported" in said
    assert "requirements-diffusers.txt" in said


def test_a_pipeline_that_does_not_inpaint_is_explained(make, tiny_pipeline, tmp_path, monkeypatch):
    """One that diffusers has no inpainting for: its family's pipelines are hidden here."""
    folder = tmp_path / "text"
    StableDiffusionPipeline(**tiny_parts(4, SIZE), requires_safety_checker=False).save_pretrained(
        folder
    )
    make(f"diffusers:{folder}", tmp_path / "four", "--steps", 1)  # four channels inpaint too

    def refuse(*arguments, **options):
        raise ValueError("AutoPipeline can't find a pipeline linked to it")

    monkeypatch.setattr(diffusers.AutoPipelineForInpainting, "from_pretrained", refuse)
    said = make(f"diffusers:{folder}", tmp_path / "out", code=1)
    assert (
        "StableDiffusionPipeline takes no image and no mask_image, so it does not inpaint" in said
    )


def test_arguments_of_no_use_are_explained(make, method_file, scene_manifest, tmp_path):
    python = f"python:{method_file}:fill"
    for method, options, words in (
        (
            "glide",
            [],
            "glide is no method; expected comfyui, diffusers:FOLDER_OR_NAME, blended-latent",
        ),
        ("python:mine.py", [], "mine.py is no method"),
        ("comfyui", [], "give a workflow in API format and --server URL"),
        (python, ["--server", "http://127.0.0.1:9"], "needs no workflow, --server or --set"),
        (python, ["--posterior", "sample"], "--posterior is for workflows"),
        (python, ["--prompt", "a photo"], "'a photo' has no {label} for the object's name"),
        (python, ["--steps", "3"], "--steps is for diffusers pipelines"),
        (python, ["--batch-size", "0"], "0 is no number of them"),
    ):
        assert words in make(method, tmp_path / "x", *options, code=2)
    (tmp_path / "wrong.py").write_text("1 / 0")
    for method, words in (
        (f"python:{tmp_path / 'none.py'}:fill", "none.py cannot be read (No such file"),
        (f"python:{method_file}:draw", "mine.py has no function draw; expected draw(image, mask"),
        (f"python:{tmp_path / 'wrong.py'}:fill", "cannot be imported (ZeroDivisionError:"),
    ):
        assert words in make(method, tmp_path / "x", code=1)
    workflow = ROOT / "workflows/baselines/cat.json"
    command = [sys.executable, ROOT / "tools/generate.py", workflow, "--steps", "3"]
    command += ["--manifest", scene_manifest, "--out", tmp_path / "x", "--server", "http://x"]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert run.returncode == 2
    assert "--steps is for methods in this process; a workflow says such things" in run.stderr
    assert not Path(tmp_path / "x").exists()
