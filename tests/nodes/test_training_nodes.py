"""The training nodes in the real host: what they learn, what they write, what they leave alone."""

import dataclasses
import logging
import sys
import tempfile

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from cat_diffusion.cat_core import weights
from cat_diffusion.cat_core.data import manifest
from cat_diffusion.cat_core.pictures import plots
from cat_diffusion.cat_core.training import loop, start
from cat_diffusion.cat_core.training.assemble import assemble
from cat_diffusion.cat_core.training.batches import Batches
from cat_diffusion.cat_core.training.settings import Settings, TrainingRun
from cat_diffusion.cat_core.training.stages import STAGES
from cat_diffusion.cat_core.training.stores import FreshSamples, KeptSamples
from cat_diffusion.cat_core.weights import trained_stages
from cat_diffusion.nodes.folder_training import examples, own_accelerate
from cat_diffusion.nodes.host import encoders as encoders_module
from cat_diffusion.nodes.host import model_files
from cat_diffusion.nodes.host.denoiser import Denoiser, trainable_unet, unet_of
from cat_diffusion.nodes.host.encoders import HostEncoders
from cat_diffusion.nodes.load import CATLoadWeights
from cat_diffusion.nodes.train_parts import CATTrainRefAdapter, CATTrainSemInpainter
from cat_diffusion.nodes.visual_prompt import CATSemanticInpaint

pytestmark = pytest.mark.slow

pytest.importorskip("accelerate")

SEM = {
    "folder": "things",
    "steps": 6,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "masked_loss": False,
    "precision": "fp32",
    "seed": 0,
    "filename_prefix": "sem",
    "licence": "CC0",
}
REF = {
    "folder": "things",
    "size": 64,
    "steps": 3,
    "batch_size": 2,
    "micro_batch_size": 1,
    "checkpointing": False,
    "learning_rate": 1e-3,
    "precision": "fp32",
    "seed": 0,
    "filename_prefix": "ref",
    "licence": "CC0",
}


def draw_examples(folder, count=4):
    """Triples of both kinds."""
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 48, 3), np.uint8)
        picture = Image.fromarray(pixels)
        mask = Image.new("L", (48, 40))
        ImageDraw.Draw(mask).ellipse((8 + i, 8, 30 + i, 32), fill=255)
        if i % 2:
            picture.save(folder / f"red_cup_{i}_image.png")
            mask.save(folder / f"red_cup_{i}_mask.png")
        else:
            picture.save(folder / f"p{i}.png")
            mask.save(folder / f"p{i}_mask.png")
            (folder / f"p{i}.txt").write_text("spoon")


@pytest.fixture
def place(monkeypatch, tmp_path):
    """ComfyUI's folders, with four examples in input/things."""
    for name in ("input", "temp"):
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    own = ([str(tmp_path / "models")], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "cat_diffusion", own)
    draw_examples(tmp_path / "input/things")
    return tmp_path


@pytest.fixture
def sem(models, place):
    """CAT Train SemInpainter with everything filled in; returns its outputs."""

    def sem(cat_model=None, **changes):
        return CATTrainSemInpainter.execute(
            models.clip_vision, models.clip, **{**SEM, **changes}, cat_model=cat_model
        ).args

    return sem


@pytest.fixture
def ref(models, place):
    """CAT Train RefAdapter with everything filled in; returns its outputs."""

    def ref(cat_model=None, model=None, **changes):
        return CATTrainRefAdapter.execute(
            model or models.model,
            models.clip_vision,
            models.clip,
            models.vae,
            **{**REF, **changes},
            cat_model=cat_model,
        ).args

    return ref


@pytest.fixture
def written(place):
    """Reads a part's tensors from a file that a node wrote."""

    def written(name, part):
        return model_files.read_path(place / f"models/{name}.safetensors").parts[part]

    return written


@pytest.fixture
def direct(models, place):
    """The same run by the core's loop itself.

    Returns the tensors of the trained part, and the loss of each step.
    """

    def direct(name, options, micro):
        (part,) = STAGES[name].parts
        rates = ((part, options["learning_rate"]),)
        stage = dataclasses.replace(STAGES[name], rates=rates)
        encoders = HostEncoders(models.clip_vision, models.clip, models.vae, models.model)
        folder = place / "input/things"
        records, _ = examples(folder)
        size = options.get("size", 512)
        fresh = FreshSamples(records, folder, encoders, objective=stage.objective, size=size)
        other = {"sem_inpainter": "ref_adapter", "ref_adapter": "sem_inpainter"}[part]
        architecture = dataclasses.replace(models.file.architecture, **{other: None})
        losses = []
        with torch.inference_mode(False), own_accelerate():
            empty = encoders.context([""]).clone() if stage.diffusion else None
            batches = Batches(KeptSamples(fresh), options["batch_size"], 0, empty)
            modules = start.trainable_parts(architecture, {}, 0)
            if stage.diffusion:
                modules["unet"] = trainable_unet(models.file)
            run = TrainingRun(
                stage,
                modules,
                assemble(stage, modules, Denoiser),
                Settings(options["steps"], options["batch_size"], micro),
                folder=place / "run",
                architecture=architecture,
                provenance="x",
                licence="x",
            )

            def on_step(step, figures):
                losses.append(figures["loss"])

            path = loop.train(run, batches, cpu=True, on_step=on_step)
        return weights.read(path).parts[part], losses

    return direct


def test_sem_inpainter_is_what_the_loop_makes_and_learns(sem, direct, place):
    cat_model, plot = sem()
    expected, losses = direct("sem-inpainter", SEM, 4)
    file = model_files.read_path(place / "models/sem_00001_.safetensors")
    assert list(file.parts) == ["sem_inpainter"]
    assert equal(file.parts["sem_inpainter"], expected)
    assert equal(cat_model.sem_inpainter.model.state_dict(), expected)
    assert losses[-1] < 0.9 * losses[0]
    assert file.metadata["license"] == "CC0"
    provenance = "trained in ComfyUI on folder things; stage sem-inpainter, 6 steps"
    assert file.metadata["provenance"] == provenance
    (stage,) = trained_stages.of_header(file.metadata)
    assert (stage["stage"], stage["steps"], stage["samples"]) == ("sem-inpainter", 6, 24)
    assert stage["data"]["manifests"] == ["things"]
    assert cat_model.trained == [stage]
    assert plot.shape == (1, 2 * plots.HALF, 640, 3)
    assert 0.5 < plot.mean() < 1
    assert plot.std() > 0.05


def test_ref_adapter_is_what_the_loop_makes_and_the_model_stays(ref, direct, written, models):
    hosted = [models.model, models.clip.patcher, models.clip_vision.patcher, models.vae.patcher]
    kept = [patcher.model.state_dict() for patcher in hosted]
    before = [copies(tensors) for tensors in kept]
    cat_model, plot = ref()
    for tensors, copied in zip(kept, before, strict=True):
        assert equal(tensors, copied)
    expected, losses = direct("ref-adapter", REF, 1)
    assert equal(written("ref_00001_", "ref_adapter"), expected)
    assert len(losses) == 3
    assert plot.shape == (1, 320, 640, 3)
    assert cat_model.sem_inpainter is None


@pytest.mark.once
def test_the_ref_adapters_loss_falls(direct):
    _, losses = direct("ref-adapter", REF | {"steps": 40, "batch_size": 4}, 4)
    assert sum(losses[-10:]) < 0.98 * sum(losses[:10])


@pytest.mark.once
def test_accumulation_and_checkpointing_change_nothing(ref, written):
    ref()
    ref(micro_batch_size=2, checkpointing=True)
    accumulated = written("ref_00001_", "ref_adapter")
    checkpointed = written("ref_00002_", "ref_adapter")
    for key, tensor in accumulated.items():
        assert (tensor - checkpointed[key]).abs().max() < 1e-4, key  # Adam's steps are 1e-3


def test_results_work_at_once_and_load_again(sem, ref, models, picture, apply, sample):
    both = ref(cat_model=sem()[0])[0]
    arguments = models.clip_vision, models.clip, *picture, "spoon"
    prompt = CATSemanticInpaint.execute(both, *arguments).args[0]
    latent = sample(apply(visual_prompt=prompt, cat_model=both))
    assert latent.isfinite().all()
    assert not torch.equal(latent, sample(models.model))
    loaded = CATLoadWeights.execute("ref_00001_.safetensors").args[0]
    prompt_again = CATSemanticInpaint.execute(loaded, *arguments).args[0]
    assert torch.equal(prompt_again.tokens, prompt.tokens)
    assert torch.equal(sample(apply(visual_prompt=prompt, cat_model=loaded)), latent)


def test_a_run_goes_on_from_a_cat_model_and_keeps_its_other_part(sem, models, place):
    parts = {
        "sem_inpainter": models.cat_model.sem_inpainter.model,
        "ref_adapter": models.cat_model.ref_adapter.model,
    }
    before = {part: copies(module.state_dict()) for part, module in parts.items()}
    sem(cat_model=models.cat_model, steps=1, learning_rate=1e-6)
    file = model_files.read_path(place / "models/sem_00001_.safetensors")
    assert equal(file.parts["ref_adapter"], before["ref_adapter"])
    moves = []
    for key, tensor in before["sem_inpainter"].items():
        moves.append((file.parts["sem_inpainter"][key] - tensor).abs().max())
    assert 0 < max(moves) < 1e-5
    assert "from tiny.safetensors" in file.metadata["provenance"]
    for part, module in parts.items():
        assert equal(module.state_dict(), before[part])


def test_the_file_tells_of_the_runs_before(sem, place):
    cat_model, _ = sem(steps=2)
    sem(cat_model=cat_model, steps=1)
    file = model_files.read_path(place / "models/sem_00002_.safetensors")
    assert [stage["steps"] for stage in trained_stages.of_header(file.metadata)] == [2, 1]


@pytest.mark.once
def test_the_same_run_again_is_the_same_under_another_name(sem, place, written):
    sem(steps=2)
    sem(steps=1, precision="bf16")  # another precision in the same process
    sem(steps=2)
    assert equal(written("sem_00001_", "sem_inpainter"), written("sem_00003_", "sem_inpainter"))
    sem(steps=1, filename_prefix="sub/mine")
    assert (place / "models/sub/mine_00001_.safetensors").exists()


def test_loras_count_and_the_hosts_weights_stay(models):
    changed = "middle_block.1.transformer_blocks.0.attn2.to_q.weight"
    plain = copies(models.model.model.state_dict())
    patched = models.model.clone()
    key = f"diffusion_model.{changed}"
    patched.add_patches({key: ("diff", (torch.ones_like(plain[key]),))}, 0.5)
    for name, tensor in unet_of(patched).parts["unet"].items():
        difference = 0.5 if name == changed else 0.0
        assert torch.allclose(tensor, plain[f"diffusion_model.{name}"] + difference), name
    assert equal(models.model.model.state_dict(), plain)


def test_cancel_keeps_what_was_learned_and_the_next_run_works(sem, place, monkeypatch, caplog):
    previews = []

    def hook(value, total, preview, node_id=None):
        previews.append(preview)
        # Four examples with two holes each come first, then the steps; the host skips some.
        if value > 8 and total > 400:
            comfy.model_management.interrupt_current_processing()

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    caplog.set_level(logging.INFO)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sem(steps=500, batch_size=1)
    (path,) = (place / "models").iterdir()
    assert path.name == "sem_00001_.safetensors"
    provenance = model_files.read_path(path).metadata["provenance"]
    done = int(provenance.split(", ")[-1].split()[0])
    assert 0 < done < 50
    assert f"Cancelled after {done} of 500 steps" in caplog.text
    assert "sem_00001_" in caplog.text
    sem(steps=1)
    _, picture, _ = previews[-1]
    assert picture.size == (640, 2 * plots.HALF)


def test_without_accelerate_the_node_says_what_to_install(sem, monkeypatch, place):
    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "accelerate":
                raise ModuleNotFoundError(f"No module named {name!r}", name="accelerate")

    for name in list(sys.modules):
        if name.split(".")[0] == "accelerate":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Blocker(), *sys.meta_path])
    with pytest.raises(ValueError) as error:
        sem()
    assert type(error.value) is ValueError
    assert f'"{sys.executable}" -m pip install "accelerate' in str(error.value)
    assert not (place / "models").exists()


def test_a_loss_that_is_no_number_is_explained(sem):
    with pytest.raises(ValueError, match=r"The loss of step . is nan.*Lower the rates") as error:
        sem(learning_rate=1e30)
    assert type(error.value) is ValueError


# Folders ------------------------------------------------------------------------------------------


def test_bad_examples_are_named_and_skipped(sem, place, caplog):
    folder = place / "input/things"
    (folder / "p0.png").write_bytes((folder / "p0.png").read_bytes()[:90])
    (folder / "p2_mask.png").write_text("no picture")
    Image.new("L", (48, 40)).save(folder / "red_cup_1_mask.png")
    Image.new("RGB", (8, 8)).save(folder / "lonely_image.png")
    Image.new("RGB", (8, 8)).save(folder / "nameless.png")
    with caplog.at_level(logging.INFO):
        sem(steps=1)
    for words in (
        "Skipped 5 examples",
        "corrupt image: p0",
        "corrupt mask: p2",
        "empty mask: red_cup_1_image",
        "missing mask: lonely_image",
        "missing label: nameless",
    ):
        assert words in caplog.text
    (folder / "red_cup_3_mask.png").unlink()
    words = r"nothing to train on in .*things. Skipped 6 examples.*Expected for each example"
    with pytest.raises(ValueError, match=words):
        sem(steps=1)


def test_a_manifest_in_the_folder_wins(sem, place):
    path = place / "input/things/manifest.jsonl"
    record = manifest.Record("a", "p0.png", box=(0.2, 0.2, 0.7, 0.8), label="spoon")
    manifest.write(path, [record])
    sem(steps=1)
    path.write_text('{"id": "a", "image": "../../x.png", "mask": "y.png", "label": "z"}')
    words = r"line 1: image is .*stays in the manifest's folder"
    with pytest.raises(ValueError, match=words) as error:
        sem(steps=1)
    assert type(error.value) is ValueError


@pytest.mark.parametrize(
    "name, words",
    [
        ("", "not a subfolder"),
        (".", "not a subfolder"),
        ("..", "not a subfolder"),
        ("../secret", "not a subfolder"),
        ("things/../../secret", "not a subfolder"),
        ("/etc", "not a subfolder"),
        ("out", "not a subfolder"),
        ("none", "There is no folder none"),
        ("empty", r"nothing to train on.*No example was found.*Expected"),
        ("linked", "link to something outside"),
        ("deep", "link to something outside"),
    ],
)
def test_folders_that_cannot_be_used(sem, place, name, words):
    root = place / "input"
    draw_examples(place / "secret")
    for folder in ("empty", "linked", "deep"):
        (root / folder).mkdir()
    (root / "out").symlink_to(place / "secret")
    (root / "linked/p0.txt").symlink_to(place / "secret/p0.txt")
    (root / "deep/sub").symlink_to(place / "secret")
    with pytest.raises(ValueError, match=words) as error:
        sem(folder=name)
    assert type(error.value) is ValueError
    assert "\n" not in str(error.value)
    assert not list(place.glob("models/*"))


@pytest.mark.parametrize("prefix", ["../x", "/tmp/x", "", " ", "a/../../x"])
def test_names_that_lead_out_of_the_models_folder(sem, prefix):
    with pytest.raises(ValueError, match="filename_prefix") as error:
        sem(filename_prefix=prefix)
    assert type(error.value) is ValueError


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"filename_prefix": "n" * 240}, "cannot be saved as .*shorter filename_prefix"),
        ({"filename_prefix": "a\0b"}, "holds a zero character"),
        ({"filename_prefix": "a\ud800"}, "holds half a character"),
        ({"licence": "CC\ud800"}, "holds half a character"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_first_step(sem, place, changes, words):
    with pytest.raises(ValueError, match=words) as error:
        sem(steps=1_000_000, **changes)
    assert type(error.value) is ValueError
    assert not list(place.glob("models/*"))


def test_weights_whose_place_is_gone_at_the_end_lie_elsewhere(sem, place, monkeypatch, caplog):
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))

    def hook(value, total, preview, node_id=None):
        if (place / "models").is_dir():
            (place / "models").rmdir()
            (place / "models").write_text("a file where the folder was")

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    with caplog.at_level(logging.INFO):
        cat_model, _ = sem(steps=1)
    (path,) = elsewhere.glob("*/*.safetensors")
    tensors = model_files.read_path(path).parts["sem_inpainter"]
    assert equal(cat_model.sem_inpainter.model.state_dict(), tensors)
    assert f"could not be saved in their place (Cannot write to {place / 'models'}" in caplog.text
    assert f"They are in {path}" in caplog.text


def test_the_host_runs_again_when_the_folder_changes(place):
    def fingerprint():
        return CATTrainSemInpainter.fingerprint_inputs(
            **SEM, clip=None, clip_vision=None, cat_model=None
        )

    before = fingerprint()
    assert before == fingerprint()
    (place / "input/things/p0.txt").write_text("a spoon")
    assert fingerprint() != before


# Models that do not fit ---------------------------------------------------------------------------


def test_models_that_cannot_be_trained(ref, apply):
    with pytest.raises(ValueError, match="from before CAT Apply RefAdapter"):
        ref(model=apply())
    with pytest.raises(ValueError, match="batch_size 3 is not a multiple of micro_batch_size 2"):
        ref(batch_size=3, micro_batch_size=2)


# Pieces -------------------------------------------------------------------------------------------


@pytest.mark.once
def test_kept_samples_are_the_fresh_ones(models, place):
    folder = place / "input/things"
    encoders = HostEncoders(models.clip_vision, models.clip, models.vae, models.model)
    records, _ = examples(folder)
    fresh = FreshSamples(records, folder, encoders, objective="diffusion", size=64)
    empty = encoders.context([""])
    expected = Batches(fresh, 4, 0, empty)(1, range(4))
    batch = Batches(KeptSamples(fresh), 4, 0, empty)(1, range(4))
    assert batch.keys() == expected.keys()
    for key, value in batch.items():
        assert torch.allclose(value.float(), expected[key].float(), atol=1e-4), key


def test_text_features_are_remembered_up_to_a_size(models, monkeypatch):
    remembering = HostEncoders(models.clip_vision, models.clip)
    cup = remembering.context(["cup"])
    monkeypatch.setattr(encoders_module, "MOST_BYTES", 2 * cup.nbytes)
    for text in ("fork", "cup", "spoon"):  # the cup was asked for after the fork
        remembering.context([text])
    assert list(remembering.texts) == [("context", "cup"), ("context", "spoon")]
    assert remembering.bytes_of_texts == 2 * cup.nbytes
    assert torch.equal(remembering.context(["cup", "fork"])[:1], cup)


@pytest.mark.parametrize("values", [[1.0], [2.0, float("nan"), 1.0], [3.0] * 50])
def test_curves_of_odd_runs(values):
    history = [{"loss": value, "cosine": 0.1, "cosine_observed": 0.0} for value in values]
    assert plots.curves(history, 50).size == (640, 2 * plots.HALF)


def copies(tensors):
    return {key: tensor.clone() for key, tensor in tensors.items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
