"""The example workflow that trains SemInpainter on a folder."""

from release.graph import Graph
from release.workflow_parts import (
    BASE_FILE,
    CLIP_VISION_FILE,
    LOADERS,
    NOTES,
    PHOTO,
    PROMPTS,
    text,
)

WATCHED = 860  # column of what shows how the training goes


def training(graph: Graph) -> None:
    """Train, watch the loss, and look at what was learned."""
    vision = graph.add(
        "CLIPVisionLoader", at=(LOADERS, 0), size=(330, 60), clip_name=CLIP_VISION_FILE
    )
    base = graph.add(
        "CheckpointLoaderSimple", at=(LOADERS, 130), size=(330, 100), ckpt_name=BASE_FILE
    )
    trained = graph.add(
        "CATTrainSemInpainter",
        at=(PROMPTS, 0),
        size=(400, 420),
        clip_vision=vision[0],
        clip=base[1],
        folder="my_examples",
    )
    photo = graph.add(
        "LoadImage",
        at=(LOADERS, 300),
        size=(330, 400),
        title="A test photo, its object under the mask",
        image=PHOTO,
    )
    label = text(graph, "Its object's name", "spoon", y=770)
    graph.add(
        "CATCompareFeatures",
        at=(WATCHED, 0),
        size=(420, 420),
        cat_model=trained[0],
        clip_vision=vision[0],
        clip=base[1],
        image=photo[0],
        mask=photo[1],
        text=label[0],
    )
    graph.add("PreviewImage", at=(WATCHED, 490), size=(420, 300), title="Loss", images=trained[1])
    graph.note(
        """# Train SemInpainter on a folder

1. Make a folder in ComfyUI's **input** folder, here *my_examples*. Each example is three files:
    *NAME.jpg*, *NAME_mask.png* (white = object) and *NAME.txt* (its name). Press R.
2. Choose it in **CAT Train SemInpainter**. Start small: 300 steps.
3. Press **Run**: the loss is drawn while it trains. Cancel keeps the weights so far. The result
    is a file in **models/cat_diffusion** and goes on in the graph.
4. **CAT Compare Features** hides the object of a photo that was *not* in the folder. *predicted*
    above *observed* means that SemInpainter has learned something.

Needs **accelerate** in ComfyUI's Python. A folder of a few dozen pictures teaches the handling,
    not a general model: the paper trained on millions of objects for 40,000 steps of 128.""",
        at=(NOTES, 0),
        size=(390, 520),
    )
