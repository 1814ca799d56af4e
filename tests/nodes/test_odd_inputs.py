"""Whatever the API, a script or another pack gives to a node: a result, or a sentence.

Each input of each node gets odd values of its kind and those of other wires, while the others are
right; then come pairs of odd values. What is tried is drawn with a fixed seed.
"""

import itertools
import math
import random
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import ROOT

from cat_diffusion.nodes.apply_ref_adapter import CATApplyRefAdapter
from cat_diffusion.nodes.clip_vision_output import CATVisualPromptToClipVision
from cat_diffusion.nodes.compare import CATCompareFeatures
from cat_diffusion.nodes.conditioning import CATInpaintConditioning, CATScheduler
from cat_diffusion.nodes.crop_and_stitch import CATCropAroundMask, CATStitch
from cat_diffusion.nodes.demo_scene import CATDemoScene
from cat_diffusion.nodes.host import model_files
from cat_diffusion.nodes.load import CATLoadCheckpoint, CATLoadWeights
from cat_diffusion.nodes.visual_prompt import (
    CATEncodeVisualPrompt,
    CATSemanticInpaint,
    CATVisualPromptPreview,
)

OF_ITS_KIND = 8  # values tried at each input
OF_OTHER_WIRES = 3
PAIRS = 80
LONGEST = 700  # letters of a message that a person reads
NODES = [
    CATLoadCheckpoint,
    CATLoadWeights,
    CATDemoScene,
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
]

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
    "caf\udce9",
    "a\x00b",
    "n" * 300,
]
NUMBERS = [-1, 0, 1, 7, 1.5, -1e308, 10**30, math.nan, math.inf, -math.inf, True, np.float32(0.5)]
NOTHING = [None, [], {}, object(), "text", 5, math.nan]
ODD = {
    "IMAGE": PICTURES,
    "MASK": MASKS,
    "STRING": TEXTS,
    "COMBO": NAMES,
    "INT": NUMBERS,
    "FLOAT": NUMBERS,
    "BOOLEAN": [2, "yes", ""],
    "CONDITIONING": [[[]], [[None, {}]], [["text", None]], [None]],
}


@pytest.fixture(scope="module")
def right(models, picture, prompt):
    """Node -> inputs with which it runs."""
    image, mask = picture
    conditioning = [[torch.zeros(1, 77, 24), {}]]
    tiny = {"cat_model": models.cat_model, "clip_vision": models.clip_vision, "clip": models.clip}
    seen = {"image": image, "mask": mask}
    with torch.inference_mode():
        crop = CATCropAroundMask.execute(**seen, size=64, context=1.5).args[2]
    model_files.register_folder()
    return {
        CATLoadCheckpoint: {"checkpoint": "cat_demo_model.safetensors"},
        CATLoadWeights: {"weights": "cat_demo_model.safetensors"},
        CATDemoScene: {"scene": "square hole"},
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
    for flaw, found in {
        "no sentence": not text.endswith((".", "?")),
        "too long": len(text) > LONGEST,
        "several lines": "\n" in text,
        "cannot be written": any("\ud800" <= letter <= "\udfff" for letter in text),
    }.items():
        if found:
            return f"{flaw}: {text!r:.300}"
    return None


def told(node, changed) -> str:
    """A call, for the list of faults."""
    values = []
    for name, value in changed.items():
        what = tuple(value.shape) if isinstance(value, torch.Tensor) else f"{value!r:.60}"
        values.append(f"{name}={what}")
    return f"{node.__name__}({', '.join(values)})"


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.__name__)
def test_one_odd_input_gives_a_result_or_a_sentence(node, right, wires):
    node.execute(**right[node])
    chance = random.Random(0)
    faults = []
    tried = 0
    for name, kind in kinds(node).items():
        odd = ODD.get(kind, [])
        # All pictures and masks on one node that is quick: the others look at them alike.
        if node is not CATEncodeVisualPrompt:
            odd = chance.sample(odd, min(len(odd), OF_ITS_KIND))
        for value in [*odd, *NOTHING, *chance.sample(wires, OF_OTHER_WIRES)]:
            found = fault(node, {**right[node], name: value})
            tried += 1
            if found:
                faults.append(f"{told(node, {name: value})}: {found}")
    assert tried >= 10 * len(kinds(node))
    assert not faults, f"{len(faults)} of {tried}:\n" + "\n".join(faults)


def test_two_odd_inputs_give_a_result_or_a_sentence(right):
    chance = random.Random(0)
    faults = []
    for node in itertools.islice(itertools.cycle(NODES[3:]), PAIRS):
        changed = {}
        for name in chance.sample(sorted(right[node]), 2):
            changed[name] = chance.choice([*ODD.get(kinds(node)[name], []), *NOTHING])
        found = fault(node, {**right[node], **changed})
        if found:
            faults.append(f"{told(node, changed)}: {found}")
    assert not faults, f"{len(faults)} of {PAIRS}:\n" + "\n".join(faults)
