"""Whatever the API, a script or another pack gives to a node: a result, or a sentence.

One or two inputs of a node get odd values of their kind or those of other wires, while the others
are right.
"""

import math
import traceback
from pathlib import Path

import folder_paths
import numpy as np
import pytest
import torch
from contract import bounded, flaw
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT
from PIL import Image

from cat_diffusion.nodes.apply_ref_adapter import CATApplyRefAdapter
from cat_diffusion.nodes.clip_vision_output import CATVisualPromptToClipVision
from cat_diffusion.nodes.compare import CATCompareFeatures
from cat_diffusion.nodes.conditioning import CATInpaintConditioning, CATScheduler
from cat_diffusion.nodes.crop_and_stitch import CATCropAroundMask, CATStitch
from cat_diffusion.nodes.demo_scene import CATDemoScene
from cat_diffusion.nodes.host import model_files
from cat_diffusion.nodes.load import CATLoadCheckpoint, CATLoadWeights
from cat_diffusion.nodes.sample_photo import SAMPLE, CATSamplePhoto
from cat_diffusion.nodes.train_parts import CATTrainRefAdapter, CATTrainSemInpainter
from cat_diffusion.nodes.visual_prompt import (
    CATEncodeVisualPrompt,
    CATSemanticInpaint,
    CATVisualPromptPreview,
)

pytestmark = pytest.mark.slow

NODES = [
    CATLoadCheckpoint,
    CATLoadWeights,
    CATDemoScene,
    CATSamplePhoto,
    CATSemanticInpaint,
    CATEncodeVisualPrompt,
    CATVisualPromptPreview,
    CATVisualPromptToClipVision,
    CATApplyRefAdapter,
    CATInpaintConditioning,
    CATScheduler,
    CATCropAroundMask,
    CATStitch,
    CATCompareFeatures,
    CATTrainSemInpainter,
    CATTrainRefAdapter,
]
TRAINING = NODES[-2:]
SHARE = 10  # of a reader's examples, as a node takes longer

PICTURES = [
    torch.zeros(1, 1, 1, 3),
    torch.zeros(1, 8, 300, 4),
    torch.zeros(2, 64, 64, 3),
    torch.zeros(17, 9, 9, 3),
    torch.zeros(64, 64, 3),
    torch.zeros(1, 64, 64),
    torch.zeros(1, 3, 64, 64),
    torch.zeros(1, 64, 64, 1),
    torch.zeros(1, 64, 64, 5),
    torch.zeros(1, 1, 64, 64, 3),
    torch.zeros(0, 64, 64, 3),
    torch.zeros(1, 0, 64, 3),
    torch.zeros(()),
    torch.full((1, 64, 64, 3), math.nan),
    torch.full((1, 64, 64, 3), math.inf),
    torch.full((1, 64, 64, 3), -1e38),
    torch.full((1, 64, 64, 3), 1e38),
    torch.rand(1, 64, 64, 3).half(),
    torch.rand(1, 64, 64, 3).double(),
    torch.zeros(1, 64, 64, 3, dtype=torch.uint8),
    torch.zeros(1, 64, 64, 3, dtype=torch.bool),
    torch.zeros(1, 64, 64, 3, dtype=torch.complex64),
    np.zeros((1, 64, 64, 3), np.float32),
    [torch.zeros(1, 64, 64, 3)],
]
MASKS = [
    torch.zeros(1, 1, 1),
    torch.ones(1, 300, 8),
    torch.ones(2, 64, 64),
    torch.ones(17, 64, 64),
    torch.ones(64, 64),
    torch.ones(1, 1, 64, 64),
    torch.ones(1, 3, 64, 64),
    torch.ones(1, 64, 64, 1),
    torch.ones(64),
    torch.ones(()),
    torch.ones(0, 64, 64),
    torch.ones(1, 64, 0),
    torch.full((1, 64, 64), math.nan),
    torch.full((1, 64, 64), -math.inf),
    torch.full((1, 64, 64), 1e38),
    torch.ones(1, 64, 64).half(),
    torch.ones(1, 64, 64, dtype=torch.bool),
    torch.ones(1, 64, 64, dtype=torch.int64),
    torch.ones(1, 64, 64, dtype=torch.complex64),
    np.ones((1, 64, 64), np.float32),
]
TEXTS = [
    "",
    " ",
    "\n\t",
    "two\nlines",
    "\ud800",
    "cat \udfff",
    "\x00",
    "star " * 2000,
    "红色",
    "🦄",
]
NAMES = [
    "",
    " ",
    "unknown",
    "..",
    "../x.safetensors",
    "/etc/passwd",
    "no picture.png",
    "no picture.png [output]",
    "caf\udce9",
    "a\x00b",
    "n" * 300,
]


def filled(shape, value, dtype):
    return torch.full(shape, value).to(dtype)


NOTHING = [None, [], {}, object(), "text", 5, math.nan]
NUMBERS = st.sampled_from([10**30, True, np.float32(0.5)]) | st.integers() | st.floats()
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=30)  # with lone surrogates
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 9, 64]), max_size=5)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.float64, torch.uint8, torch.bool])
VALUES = st.sampled_from([0.0, 1.0, 0.5, -1.0, 7.0, math.nan, math.inf])
TENSORS = st.builds(filled, SHAPES, VALUES, DTYPES)
ODD = {
    "IMAGE": st.sampled_from(PICTURES) | TENSORS,
    "MASK": st.sampled_from(MASKS) | TENSORS,
    "STRING": st.sampled_from(TEXTS) | ANY_TEXT,
    "COMBO": st.sampled_from(NAMES) | ANY_TEXT,
    "INT": NUMBERS,
    "FLOAT": NUMBERS,
    "BOOLEAN": st.sampled_from([2, "yes", ""]),
    "CONDITIONING": st.sampled_from([[[]], [[None, {}]], [["text", None]], [None]]),
}
FEW_STEPS = st.integers(-2, 2) | st.sampled_from([1.5, math.nan, True, "text"])  # none takes years


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """The host's input folder with one example to train on, and a place for the weights."""
    place = tmp_path_factory.mktemp("odd")
    things = place / "input/things"
    things.mkdir(parents=True)
    (place / "input/no picture.png").write_text("a text")
    Image.new("RGB", (48, 40), "red").save(things / "a_red_cup_image.png")
    Image.radial_gradient("L").resize((48, 40)).point(lambda level: 255 * (level < 99)).save(
        things / "a_red_cup_mask.png"
    )
    model_files.register_folder()
    folders, endings = folder_paths.folder_names_and_paths["cat_diffusion"]
    own = ([str(place / "models"), *folders], endings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(folder_paths.folder_names_and_paths, "cat_diffusion", own)
        for name in ("input", "temp"):
            patch.setattr(folder_paths, f"{name}_directory", str(place / name))
        yield


@pytest.fixture(scope="module")
def right(models, picture, prompt, examples):
    """Node -> inputs with which it runs."""
    image, mask = picture
    conditioning = [[torch.zeros(1, 77, 24), {}]]
    tiny = {"cat_model": models.cat_model, "clip_vision": models.clip_vision, "clip": models.clip}
    seen = {"image": image, "mask": mask}
    with torch.inference_mode():
        crop = CATCropAroundMask.execute(**seen, size=64, context=1.5).args[2]
    train = {
        "clip_vision": models.clip_vision,
        "clip": models.clip,
        "folder": "things",
        "steps": 1,
        "batch_size": 1,
        "learning_rate": 1e-4,
        "precision": "fp32",
        "seed": 0,
        "filename_prefix": "odd",
        "licence": "CC0",
        "cat_model": models.cat_model,
    }
    return {
        CATLoadCheckpoint: {"checkpoint": "cat_demo_model.safetensors"},
        CATLoadWeights: {"weights": "cat_demo_model.safetensors"},
        CATDemoScene: {"scene": "square hole"},
        CATSamplePhoto: {"image": SAMPLE},
        CATSemanticInpaint: {**tiny, **seen, "text": "spoon", "previous": prompt},
        CATEncodeVisualPrompt: {"clip_vision": models.clip_vision, **seen},
        CATVisualPromptPreview: {
            "visual_prompt": prompt,
            "clip": models.clip,
            "clip_vision": models.clip_vision,
        },
        CATVisualPromptToClipVision: {
            "visual_prompt": prompt,
            "clip_vision": models.clip_vision,
        },
        CATApplyRefAdapter: {
            "model": models.model,
            "cat_model": models.cat_model,
            "visual_prompt": prompt,
            "strength": 1.0,
            "start_percent": 0.0,
            "end_percent": 1.0,
        },
        CATInpaintConditioning: {
            "positive": conditioning,
            "negative": conditioning,
            "vae": models.vae,
            **seen,
            "fill": "black",
            "noise_mask": True,
            "posterior": "sample",
            "posterior_seed": 7,
        },
        CATScheduler: {"model": models.model, "steps": 4, "denoise": 1.0},
        CATCropAroundMask: {**seen, "size": 64, "context": 1.5},
        CATStitch: {"crop": crop, "image": image, "soft_edge": 8},
        CATCompareFeatures: {**tiny, **seen, "text": "spoon"},
        CATTrainSemInpainter: {**train, "masked_loss": False},
        CATTrainRefAdapter: {
            **train,
            "model": models.model,
            "vae": models.vae,
            "size": 64,
            "micro_batch_size": 1,
            "checkpointing": False,
        },
    }


@pytest.fixture(scope="module")
def wires(right):
    """Everything that any wire carries, for inputs that expect another one."""
    values = {}
    for inputs in right.values():
        values.update(inputs)
    return list(values.values())


def kinds(node) -> dict[str, str]:
    """Input id -> the type of its wire."""
    return {entry.id: entry.get_io_type() for entry in node.define_schema().inputs}


def fault(node, inputs) -> str | None:
    """What is wrong with how the node answers, or None."""
    try:
        node.execute(**inputs)
    except Exception as error:
        return fault_of_error(error)
    return None


def fault_of_error(error: Exception) -> str | None:
    text = str(error)
    if type(error) is not ValueError:
        return f"{type(error).__name__}: {text!r:.300}"
    place = traceback.extract_tb(error.__traceback__)[-1].filename
    if not Path(place).resolve().is_relative_to(ROOT.resolve()):
        return f"raised in {place}: {text!r:.300}"
    return flaw(text)


def told(node, changed) -> str:
    """A call, for the list of faults."""
    values = []
    for name, value in changed.items():
        what = tuple(value.shape) if isinstance(value, torch.Tensor) else f"{value!r:.60}"
        values.append(f"{name}={what}")
    return f"{node.__name__}({', '.join(values)})"


def values_of(node, name, wires):
    """What an input is tried with."""
    if name == "steps" and node in TRAINING:
        return FEW_STEPS
    others = st.sampled_from(NOTHING) | st.sampled_from(wires)
    kind = kinds(node)[name]
    return ODD[kind] | others if kind in ODD else others


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.__name__)
def test_odd_inputs_give_a_result_or_a_sentence(node, right, wires):
    node.execute(**right[node])

    @settings(max_examples=settings().max_examples // SHARE)
    @given(data=st.data())
    def try_some(data):
        names = st.sampled_from(sorted(right[node]))
        changed = {}
        for name in data.draw(st.lists(names, min_size=1, max_size=2)):
            changed[name] = data.draw(values_of(node, name, wires))
        with bounded(600):
            found = fault(node, {**right[node], **changed})
        assert found is None, f"{told(node, changed)}: {found}"

    try_some()


@pytest.mark.parametrize("name, values", [("image", PICTURES), ("mask", MASKS)])
def test_odd_pictures(name, values, right):
    """All of them on one node that is quick: the others look at them alike."""
    for value in values:
        changed = {name: value}
        found = fault(CATEncodeVisualPrompt, {**right[CATEncodeVisualPrompt], **changed})
        assert found is None, f"{told(CATEncodeVisualPrompt, changed)}: {found}"
