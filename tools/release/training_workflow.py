"""The example workflow that trains SemInpainter on a folder."""

from release.graph import Graph
from release.workflow_parts import (
    BASE_FILE,
    CLIP_VISION_FILE,
    chinese_note,
    object_label,
    sample_photo,
)


def training(graph: Graph) -> None:
    """Train, watch the loss, and look at what was learned."""
    first = graph.column(340)
    guide = first.step()
    middle = graph.column(360)
    models = middle.step("Model files")
    train = middle.step("1 Train on a folder", "draw")
    test = graph.column(310).step("2 A photo that it has not seen", "photo")
    result = graph.column(400).step("3 What was learned", "result")
    vision = models.add("CLIPVisionLoader", clip_name=CLIP_VISION_FILE)
    base = models.add("CheckpointLoaderSimple", ckpt_name=BASE_FILE)
    trained = train.add(
        "CATTrainSemInpainter",
        height=560,
        clip_vision=vision[0],
        clip=base[1],
        folder="my_examples",
    )
    photo = sample_photo(test)
    label = object_label(test, title="What is under its mask")
    result.add(
        "CATCompareFeatures",
        height=400,
        cat_model=trained[0],
        clip_vision=vision[0],
        clip=base[1],
        image=photo[0],
        mask=photo[1],
        text=label[0],
    )
    result.add("PreviewImage", height=300, title="Loss", images=trained[1])
    guide.note(
        """# Train SemInpainter on a folder

**1** Make a folder in ComfyUI's **input** folder, here *my_examples*. Each example is three files:
    *NAME.jpg*, *NAME_mask.png* (white = object) and *NAME.txt* (its name). Press R, choose the
    folder, start with 300 steps, and press **Run**. The loss is drawn while it trains; Cancel
    keeps the weights so far. The result is a file in **models/cat_diffusion**.

**2** A photo that is *not* in the folder, and its object under the mask. The sample stands in for
    yours.

**3** The object is hidden from CLIP. *predicted* above *observed* means that SemInpainter has
    learned something.

Needs **accelerate** in ComfyUI's Python. A few dozen pictures teach the handling, not a general
    model: the paper trained on millions of objects.""",
        chinese_note("cat_train"),
        height=360,
    )
