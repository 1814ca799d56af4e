"""The training nodes as a browser sees them: progress, plot, weights, the cache, Cancel."""

from threading import Thread

import numpy as np
import pytest
from PIL import Image, ImageDraw

from comfyui.local_server import ServerError

pytest.importorskip("accelerate")


def write_example(folder, number):
    """A noisy picture of a cup, and where the cup is."""
    noise = np.random.default_rng(number).integers(0, 255, (40, 48, 3), np.uint8)
    Image.fromarray(noise).save(folder / f"cup_{number}_image.png")
    mask = Image.new("L", (48, 40))
    ImageDraw.Draw(mask).rectangle((8, 8, 30, 30), fill=255)
    mask.save(folder / f"cup_{number}_mask.png")


@pytest.fixture(scope="module")
def things(base):
    """Three examples in ComfyUI's input folder."""
    folder = base / "input/things"
    folder.mkdir()
    for number in range(3):
        write_example(folder, number)
    return folder


def use(prompt, cat_model):
    """Let the workflow take both CAT parts from there."""
    for node in ("CATSemanticInpaint", "CATApplyRefAdapter"):
        prompt.inputs(node)["cat_model"] = cat_model


@pytest.fixture
def both(prompt, things):
    """The example workflow with both parts trained in it first."""
    common = {
        "folder": "things",
        "learning_rate": 1e-3,
        "precision": "fp32",
        "seed": 0,
        "licence": "CC0",
        "clip_vision": ["1", 3],
        "clip": ["1", 1],
        "batch_size": 2,
    }
    sem_inpainter = prompt.add(
        "sem",
        "CATTrainSemInpainter",
        steps=4,
        masked_loss=True,
        filename_prefix="both/sem",
        **common,
    )
    ref_adapter = prompt.add(
        "ref",
        "CATTrainRefAdapter",
        model=["1", 0],
        vae=["1", 2],
        size=64,
        steps=2,
        micro_batch_size=1,
        checkpointing=True,
        filename_prefix="both/ref",
        cat_model=sem_inpainter,
        **common,
    )
    use(prompt, ref_adapter)
    return prompt


def choices(server, node, name):
    """What a combo input offers."""
    return server.get(f"/object_info/{node}")[node]["input"]["required"][name][1]["options"]


def test_a_workflow_trains_and_uses_what_it_trained(server, base, both, run, things):
    progress = []

    def note(kind, data):
        if kind == "progress":
            progress.append((data["node"], data["value"], data["max"]))

    result, latent = run(both, on_event=note)
    assert latent.isfinite().all()
    encoded = 6  # three examples, two masks each
    for node, plot_size, total in (
        ("sem", (640, 452), encoded + 4),
        ("ref", (640, 320), encoded + 2),
    ):
        plot = server.image_path(result.outputs[node]["images"][0])
        assert Image.open(plot).size == plot_size
        assert result.texts[node].startswith(f"Saved as {node}_00001_.safetensors")
        assert (base / f"models/cat_diffusion/both/{node}_00001_.safetensors").exists()
        assert (node, total, total) in progress

    again, _ = run(both)  # nothing has changed
    assert not {"sem", "ref"} & set(again.seconds)
    (things / "cup_2_mask.png").unlink()
    changed, _ = run(both)
    assert {"sem", "ref"} <= set(changed.seconds)
    assert "missing mask: cup_2_image" in changed.texts["sem"]

    use(both, both.add("loaded", "CATLoadWeights", weights="both/ref_00002_.safetensors"))
    del both["sem"], both["ref"]
    loaded, _ = run(both)
    assert loaded.texts["loaded"].endswith("SemInpainter and RefAdapter")


@pytest.mark.parametrize("node, prefix", [("sem", "long_sem"), ("ref", "long_ref")])
def test_cancel_saves_and_the_server_goes_on(server, base, both, run, node, prefix):
    long = both.copy()
    for number in set(long) - {"1", node}:
        del long[number]
    training = long[node]["inputs"]
    training.update(steps=100_000, filename_prefix=prefix)
    training.pop("cat_model", None)
    done = []  # steps, behind the encoded holes

    def cancel(kind, data):
        if kind == "progress" and data["node"] == node and data["value"] > 8:
            if not done:
                Thread(target=server.post, args=("/interrupt",)).start()
            done.append(data["value"])

    result = server.run(long, on_event=cancel)
    assert result.interrupted
    assert 8 < done[-1] < 50_000
    (file,) = (base / "models/cat_diffusion").glob(f"{prefix}*")
    assert file.name == f"{prefix}_00001_.safetensors"
    assert "Cancelled after" in result.texts[node]
    assert file.name in result.texts[node]
    assert file.name in choices(server, "CATLoadWeights", "weights")

    so_far = long.add("so far", "CATLoadWeights", weights=file.name)
    training.update(steps=1, cat_model=so_far)
    result, _ = run(long)
    assert result.texts[node].startswith(f"Saved as {prefix}_00002_")


def test_folders_are_offered_and_others_refused(server, both):
    assert "things" in choices(server, "CATTrainSemInpainter", "folder")
    for name in ("../models", "/etc", "none"):
        both["sem"]["inputs"]["folder"] = name
        with pytest.raises(ServerError, match="not in list"):
            server.run(both)


def test_an_empty_folder_is_explained(error, both, base):
    (base / "input/bare").mkdir(exist_ok=True)
    both["sem"]["inputs"]["folder"] = "bare"
    node, message = error(both)
    assert node == "CATTrainSemInpainter"
    assert "nothing to train on" in message
    assert "Expected" in message


def test_a_model_of_another_family_is_explained(error, both):
    del both["sem"]
    both["ref"]["inputs"].pop("cat_model")
    both["ref"]["inputs"]["model"] = both.add("other", "HelperModel", kind="flux")
    node, message = error(both)
    assert node == "CATTrainRefAdapter"
    assert "Flux" in message
    assert "SD 1.5 inpainting" in message
