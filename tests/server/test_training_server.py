"""The training nodes as a browser sees them: progress, plot, weights on the wire, the cache, Cancel."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def things(base):
    """Three examples in ComfyUI's input folder."""
    folder = base / "input/things"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 48, 3), np.uint8)).save(
            folder / f"cup_{i}_image.png"
        )
        mask = Image.new("L", (48, 40))
        ImageDraw.Draw(mask).rectangle((8, 8, 30, 30), fill=255)
        mask.save(folder / f"cup_{i}_mask.png")
    return folder


@pytest.fixture
def both(prompt, things):
    """The example workflow with both parts trained in it first."""
    common = dict(folder="things", learning_rate=1e-3, precision="fp32", seed=0, licence="CC0")
    sem = prompt.add(
        "sem",
        "CATTrainSemInpainter",
        clip_vision=["1", 3],
        clip=["1", 1],
        steps=4,
        batch_size=2,
        masked_loss=True,
        filename_prefix="both/sem",
        **common,
    )
    ref = prompt.add(
        "ref",
        "CATTrainRefAdapter",
        model=["1", 0],
        clip_vision=["1", 3],
        clip=["1", 1],
        vae=["1", 2],
        size=64,
        steps=2,
        batch_size=2,
        micro_batch_size=1,
        checkpointing=True,
        filename_prefix="both/ref",
        cat_model=sem,
        **common,
    )
    prompt.inputs("CATSemanticInpaint")["cat_model"] = prompt.inputs("CATApplyRefAdapter")[
        "cat_model"
    ] = ref
    return prompt


def test_a_workflow_trains_and_uses_what_it_trained(server, base, both, run, things):
    steps = []
    result, latent = run(
        both,
        on_event=lambda kind, data: (
            steps.append((data["node"], data["value"], data["max"])) if kind == "progress" else None
        ),
    )
    assert latent.isfinite().all()
    for node, size, total in (("sem", (640, 480), 6 + 4), ("ref", (640, 240), 6 + 2)):
        assert Image.open(server.image_path(result.outputs[node]["images"][0])).size == size
        assert result.texts[node].startswith(f"Saved as {node}_00001_.safetensors")
        assert (base / f"models/cat_diffusion/both/{node}_00001_.safetensors").exists()
        assert (node, total, total) in steps

    again, _ = run(both)  # nothing has changed
    assert not {"sem", "ref"} & set(again.seconds)
    (things / "cup_2_mask.png").unlink()
    changed, _ = run(both)
    assert {"sem", "ref"} <= set(changed.seconds) and "missing mask: cup_2_image" in changed.texts[
        "sem"
    ]
    loaded = both.add("loaded", "CATLoadWeights", weights="both/ref_00002_.safetensors")
    both.inputs("CATSemanticInpaint")["cat_model"] = both.inputs("CATApplyRefAdapter")[
        "cat_model"
    ] = loaded
    del both["sem"], both["ref"]
    assert run(both)[0].texts["loaded"].endswith("SemInpainter and RefAdapter")


@pytest.mark.parametrize("node, prefix", [("sem", "long_sem"), ("ref", "long_ref")])
def test_cancel_saves_and_the_server_goes_on(server, base, both, run, node, prefix):
    from threading import Thread

    long = both.copy()
    for number in set(long) - {"1", node}:
        del long[number]
    long[node]["inputs"].update(steps=100_000, filename_prefix=prefix)
    long[node]["inputs"].pop("cat_model", None)
    asked = []

    def cancel(kind, data):
        if kind == "progress" and data["node"] == node and data["value"] > 8 and not asked:
            asked.append(data["value"])
            Thread(target=server.post, args=("/interrupt",)).start()

    result = server.run(long, on_event=cancel)
    assert result.interrupted and result.seconds[node] < 30
    files = list((base / "models/cat_diffusion").glob(f"{prefix}*"))
    assert [file.name for file in files] == [f"{prefix}_00001_.safetensors"]
    assert "Cancelled after" in result.texts[node] and files[0].name in result.texts[node]
    names = server.get("/object_info/CATLoadWeights")["CATLoadWeights"]["input"]["required"][
        "weights"
    ][1]["options"]
    assert files[0].name in names
    long[node]["inputs"].update(
        steps=1, cat_model=long.add("so far", "CATLoadWeights", weights=files[0].name)
    )
    assert run(long)[0].texts[node].startswith(f"Saved as {prefix}_00002_")


def test_folders_are_offered_and_others_refused(server, both, things):
    from comfyui.local_server import ServerError

    options = server.get("/object_info/CATTrainSemInpainter")["CATTrainSemInpainter"]["input"][
        "required"
    ]["folder"][1]["options"]
    assert "things" in options
    for name in ("../models", "/etc", "none"):
        both["sem"]["inputs"]["folder"] = name
        with pytest.raises(ServerError, match="not in list|Value not in list"):
            server.run(both)


def test_an_error_reads_as_a_sentence(error, both, base):
    (base / "input/bare").mkdir(exist_ok=True)
    both["sem"]["inputs"]["folder"] = "bare"
    node, message = error(both)
    assert (
        node == "CATTrainSemInpainter"
        and "nothing to train on" in message
        and "Expected" in message
    )
    both["ref"]["inputs"].pop("cat_model")
    del both["sem"]
    both["ref"]["inputs"]["model"] = both.add("other", "HelperModel", kind="flux")
    node, message = error(both)
    assert node == "CATTrainRefAdapter" and "Flux" in message and "SD 1.5 inpainting" in message
