"""The training nodes in the real host: what they learn, what they write, and what they leave alone."""

import dataclasses
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from cat_diffusion.nodes import train_parts
from cat_diffusion.nodes.host import model_files

pytest.importorskip("accelerate")

SEM = dict(
    folder="things",
    steps=6,
    batch_size=4,
    learning_rate=1e-3,
    masked_loss=False,
    precision="fp32",
    seed=0,
    filename_prefix="sem",
    licence="CC0",
)
REF = dict(
    folder="things",
    size=64,
    steps=3,
    batch_size=2,
    micro_batch_size=1,
    checkpointing=False,
    learning_rate=1e-3,
    precision="fp32",
    seed=0,
    filename_prefix="ref",
    licence="CC0",
)


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
def place(monkeypatch, tmp_path):
    """ComfyUI's folders, with four examples in input/things."""
    import folder_paths

    for name in ("input", "temp"):
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths,
        "cat_diffusion",
        ([str(tmp_path / "models")], {".safetensors"}),
    )
    examples(tmp_path / "input/things")
    return tmp_path


@pytest.fixture
def nodes():
    return train_parts


@pytest.fixture
def sem(nodes, models, place):
    def sem(cat_model=None, **changes):
        return nodes.CATTrainSemInpainter.execute(
            models.clip_vision, models.clip, **{**SEM, **changes}, cat_model=cat_model
        ).args

    return sem


@pytest.fixture
def ref(nodes, models, place):
    def ref(cat_model=None, model=None, **changes):
        return nodes.CATTrainRefAdapter.execute(
            model or models.model,
            models.clip_vision,
            models.clip,
            models.vae,
            **{**REF, **changes},
            cat_model=cat_model,
        ).args

    return ref


@pytest.fixture
def direct(models, place, nodes):
    """The same run by the core's loop itself; returns (tensors of the trained part, loss of each step)."""
    from cat_diffusion.cat_core import weights
    from cat_diffusion.cat_core.training import loop, objectives, samples, start
    from cat_diffusion.cat_core.training.stages import STAGES
    from cat_diffusion.nodes.host.denoiser import Denoiser, trainable_unet
    from cat_diffusion.nodes.host.encoders import HostEncoders

    def direct(stage, options, micro):
        stage, architecture = STAGES[stage], models.file.architecture
        ((part, _),) = stage.rates
        diffusion = part == "ref_adapter"
        encoders = HostEncoders(models.clip_vision, models.clip, models.vae, models.model)
        records, _ = nodes._examples(place / "input/things")
        store = samples.Kept(
            samples.Fresh(
                records,
                place / "input/things",
                encoders,
                stage.objective,
                options.get("size", 512),
                8,
            )
        )
        with torch.inference_mode(False), nodes._own_accelerate():
            with torch.no_grad():
                source = samples.Source(
                    store, options["batch_size"], 0, encoders.context([""]).clone()
                )
            fresh = dataclasses.replace(
                architecture,
                **{name: None for name in ("sem_inpainter", "ref_adapter") if name != part},
            )
            modules = start.trainable_parts(fresh, {}, 0)
            if diffusion:
                modules["unet"] = trainable_unet(models.file)
                objective = objectives.Diffusion(
                    Denoiser(modules["unet"], modules[part]), objectives.stable_diffusion_schedule()
                )
            else:
                objective = objectives.Distillation(modules[part])

            def encoded(step, positions):
                with torch.no_grad():
                    return {key: value.clone() for key, value in source(step, positions).items()}

            losses = []
            file = loop.train(
                dataclasses.replace(stage, rates=((part, options["learning_rate"]),)),
                objective,
                modules,
                encoded,
                place / "run",
                loop.Settings(options["steps"], options["batch_size"], micro),
                fresh,
                provenance="x",
                licence="x",
                cpu=True,
                on_step=lambda step, figures: losses.append(figures["loss"]),
            )
        return weights.read(file).parts[part], losses

    return direct


def test_sem_inpainter_is_what_the_loop_makes_and_learns(sem, direct, place):
    cat_model, plot = sem()
    expected, losses = direct("sem-inpainter", SEM, 4)
    found = model_files.read_path(place / "models/sem_00001_.safetensors")
    assert list(found.parts) == ["sem_inpainter"] and equal(found.parts["sem_inpainter"], expected)
    assert equal(cat_model.sem_inpainter.model.state_dict(), expected)
    assert losses[-1] < 0.9 * losses[0]
    assert found.metadata["license"] == "CC0"
    assert (
        found.metadata["provenance"]
        == "trained in ComfyUI on folder things; stage sem-inpainter, 6 steps"
    )
    assert plot.shape == (1, 480, 640, 3) and 0.5 < plot.mean() < 1 and plot.std() > 0.05


def test_ref_adapter_is_what_the_loop_makes_and_the_model_stays(ref, direct, place, models):
    patchers = models.model, models.clip.patcher, models.clip_vision.patcher, models.vae.patcher
    kept = [patcher.model.state_dict() for patcher in patchers]
    before = [{key: tensor.clone() for key, tensor in tensors.items()} for tensors in kept]
    cat_model, plot = ref()
    assert all(equal(a, b) for a, b in zip(kept, before))
    expected, losses = direct("ref-adapter", REF, 1)
    assert equal(
        model_files.read_path(place / "models/ref_00001_.safetensors").parts["ref_adapter"],
        expected,
    )
    assert len(losses) == 3 and plot.shape == (1, 240, 640, 3) and cat_model.sem_inpainter is None


def test_the_ref_adapters_loss_falls(direct):
    _, losses = direct("ref-adapter", REF | dict(steps=40, batch_size=4), 4)
    assert sum(losses[-10:]) < 0.98 * sum(losses[:10])


def test_accumulation_and_checkpointing_change_nothing(ref, place):
    ref()
    ref(micro_batch_size=2, checkpointing=True)
    one, two = (
        model_files.read_path(place / f"models/ref_{i:05}_.safetensors").parts["ref_adapter"]
        for i in (1, 2)
    )
    assert all((one[key] - two[key]).abs().max() < 1e-4 for key in one)  # Adam's steps are 1e-3


def test_results_work_at_once_and_load_again(sem, ref, models, picture, apply, sample, place):
    from cat_diffusion.nodes.load import CATLoadWeights
    from cat_diffusion.nodes.visual_prompt import CATSemanticInpaint

    both = ref(cat_model=sem()[0])[0]
    arguments = models.clip_vision, models.clip, *picture, "spoon"
    visual_prompt = CATSemanticInpaint.execute(both, *arguments).args[0]
    latent = sample(apply(visual_prompt=visual_prompt, cat_model=both))
    assert latent.isfinite().all() and not torch.equal(latent, sample(models.model))
    loaded = CATLoadWeights.execute("ref_00001_.safetensors").args[0]
    assert torch.equal(
        CATSemanticInpaint.execute(loaded, *arguments).args[0].tokens, visual_prompt.tokens
    )
    assert torch.equal(sample(apply(visual_prompt=visual_prompt, cat_model=loaded)), latent)


def test_a_run_goes_on_from_a_cat_model_and_keeps_its_other_part(sem, models, place):
    before = {
        part: {
            key: tensor.clone()
            for key, tensor in getattr(models.cat_model, part).model.state_dict().items()
        }
        for part in ("sem_inpainter", "ref_adapter")
    }
    sem(cat_model=models.cat_model, steps=1, learning_rate=1e-6)
    file = model_files.read_path(place / "models/sem_00001_.safetensors")
    assert equal(file.parts["ref_adapter"], before["ref_adapter"])
    moved = [
        (file.parts["sem_inpainter"][key] - tensor).abs().max()
        for key, tensor in before["sem_inpainter"].items()
    ]
    assert 0 < max(moved) < 1e-5 and "from tiny.safetensors" in file.metadata["provenance"]
    assert all(
        equal(getattr(models.cat_model, part).model.state_dict(), before[part]) for part in before
    )


def test_the_same_run_again_is_the_same_under_another_name(sem, place):
    sem(steps=2)
    sem(steps=1, precision="bf16")  # another precision in the same process
    sem(steps=2)
    first, _, again = (
        model_files.read_path(place / f"models/sem_{i:05}_.safetensors").parts["sem_inpainter"]
        for i in (1, 2, 3)
    )
    assert equal(first, again)
    sem(steps=1, filename_prefix="sub/mine")
    assert (place / "models/sub/mine_00001_.safetensors").exists()


def test_loras_count_and_the_hosts_weights_stay(models, nodes):
    key = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_q.weight"
    plain = {name: tensor.clone() for name, tensor in models.model.model.state_dict().items()}
    patched = models.model.clone()
    patched.add_patches({key: ("diff", (torch.ones_like(plain[key]),))}, 0.5)
    found = nodes.unet_of(patched).parts["unet"]
    for name, tensor in found.items():
        expected = plain[f"diffusion_model.{name}"]
        assert torch.allclose(tensor, expected + 0.5 * (f"diffusion_model.{name}" == key)), name
    assert equal(models.model.model.state_dict(), plain)


def test_cancel_keeps_what_was_learned_and_the_next_run_works(sem, place, monkeypatch, caplog):
    import comfy.model_management
    import comfy.utils

    shown = []

    def hook(value, total, preview, node_id=None):
        shown.append(preview)
        if (
            value > 8 and total > 400
        ):  # four examples with two holes each, then the steps; the host skips some
            comfy.model_management.interrupt_current_processing()

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    with (
        caplog.at_level("INFO"),
        pytest.raises(comfy.model_management.InterruptProcessingException),
    ):
        sem(steps=500, batch_size=1)
    files = list((place / "models").iterdir())
    assert [file.name for file in files] == ["sem_00001_.safetensors"]
    done = int(model_files.read_path(files[0]).metadata["provenance"].split(", ")[-1].split()[0])
    assert (
        0 < done < 50
        and f"Cancelled after {done} of 500 steps" in caplog.text
        and "sem_00001_" in caplog.text
    )
    sem(steps=1)
    assert shown[-1][1].size == (640, 480)


def test_without_accelerate_the_node_says_what_to_install(sem, monkeypatch, place):
    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "accelerate":
                raise ModuleNotFoundError(f"No module named {name!r}", name="accelerate")

    for name in [name for name in sys.modules if name.split(".")[0] == "accelerate"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Blocker(), *sys.meta_path])
    with pytest.raises(ValueError) as error:
        sem()
    assert type(
        error.value
    ) is ValueError and f'"{sys.executable}" -m pip install "accelerate' in str(error.value)
    assert not (place / "models").exists()


def test_a_loss_that_is_no_number_is_explained(sem):
    with pytest.raises(ValueError, match="The loss of step . is nan.*Lower the rates") as error:
        sem(learning_rate=1e30)
    assert type(error.value) is ValueError


# Folders ------------------------------------------------------------------------------------------------------------


def test_bad_examples_are_named_and_skipped(sem, place, caplog):
    folder = place / "input/things"
    (folder / "p0.png").write_bytes((folder / "p0.png").read_bytes()[:90])
    (folder / "p2_mask.png").write_text("no picture")
    Image.new("L", (48, 40)).save(folder / "red_cup_1_mask.png")
    Image.new("RGB", (8, 8)).save(folder / "lonely_image.png")
    Image.new("RGB", (8, 8)).save(folder / "nameless.png")
    with caplog.at_level("INFO"):
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
    with pytest.raises(
        ValueError,
        match="nothing to train on in .*things. Skipped 6 examples.*Expected for each example",
    ):
        sem(steps=1)


def test_a_manifest_in_the_folder_wins(sem, place):
    from cat_diffusion.cat_core.data import manifest

    folder = place / "input/things"
    manifest.write(
        folder / "manifest.jsonl",
        [manifest.Record("a", "p0.png", box=(0.2, 0.2, 0.7, 0.8), label="spoon")],
    )
    sem(steps=1)
    (folder / "manifest.jsonl").write_text(
        '{"id": "a", "image": "../../x.png", "mask": "y.png", "label": "z"}'
    )
    with pytest.raises(
        ValueError, match="line 1: image is .*stays in the manifest's folder"
    ) as error:
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
        ("empty", "nothing to train on.*No example was found.*Expected"),
        ("linked", "link to something outside"),
        ("deep", "link to something outside"),
    ],
)
def test_folders_that_cannot_be_used(sem, place, name, words):
    root = place / "input"
    examples(place / "secret")
    for folder in ("empty", "linked", "deep"):
        (root / folder).mkdir()
    (root / "out").symlink_to(place / "secret")
    (root / "linked/p0.txt").symlink_to(place / "secret/p0.txt")
    (root / "deep/sub").symlink_to(place / "secret")
    with pytest.raises(ValueError, match=words) as error:
        sem(folder=name)
    assert (
        type(error.value) is ValueError
        and "\n" not in str(error.value)
        and not list(place.glob("models/*"))
    )


@pytest.mark.parametrize("prefix", ["../x", "/tmp/x", "", " ", "a/../../x"])
def test_names_that_lead_out_of_the_models_folder(sem, place, prefix):
    with pytest.raises(ValueError, match="filename_prefix") as error:
        sem(filename_prefix=prefix)
    assert type(error.value) is ValueError


def test_the_host_runs_again_when_the_folder_changes(nodes, place):
    fingerprint = nodes.CATTrainSemInpainter.fingerprint_inputs
    before = fingerprint(**SEM, clip=None, clip_vision=None, cat_model=None)
    assert before == fingerprint(**SEM, clip=None, clip_vision=None, cat_model=None)
    (place / "input/things/p0.txt").write_text("a spoon")
    assert fingerprint(**SEM, clip=None, clip_vision=None, cat_model=None) != before


# Models that do not fit ---------------------------------------------------------------------------------------------


def test_models_that_cannot_be_trained(ref, models, apply):
    with pytest.raises(ValueError, match="from before CAT Apply RefAdapter"):
        ref(model=apply())
    with pytest.raises(ValueError, match="batch_size 3 is not a multiple of micro_batch_size 2"):
        ref(batch_size=3, micro_batch_size=2)


# Pieces -------------------------------------------------------------------------------------------------------------


def test_kept_samples_are_the_fresh_ones(models, nodes, place):
    from cat_diffusion.cat_core.training import samples
    from cat_diffusion.nodes.host.encoders import HostEncoders

    folder = place / "input/things"
    encoders = HostEncoders(models.clip_vision, models.clip, models.vae, models.model)
    fresh = samples.Fresh(nodes._examples(folder)[0], folder, encoders, "diffusion", 64, 8)
    batches = [
        samples.Source(store, 4, 0, encoders.context([""]))(1, range(4))
        for store in (fresh, samples.Kept(fresh))
    ]
    assert batches[0].keys() == batches[1].keys()
    for key, value in batches[0].items():
        assert torch.allclose(value.float(), batches[1][key].float(), atol=1e-4), key


@pytest.mark.parametrize("values", [[1.0], [2.0, float("nan"), 1.0], [3.0] * 50])
def test_curves_of_odd_runs(values):
    from cat_diffusion.cat_core.pictures import plots

    picture = plots.curves(
        [{"loss": value, "cosine": 0.1, "cosine_observed": 0.0} for value in values], 50
    )
    assert picture.size == (640, 480)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
