"""The example workflows that run on the bundled demo model as they are."""

from release.graph import Graph, PlacedNode, Step
from release.workflow_parts import (
    apply_adapter,
    cat_diffusion,
    chinese_note,
    decode,
    full_checkpoint,
    object_label,
    page,
    prompt,
    put_back,
    sample,
    save,
    semantic_inpaint,
)
from release.workflow_runs import DEMO

SAMPLING = {"steps": 20, "cfg": 3.0}  # enough for the demo model


def demo(graph: Graph) -> None:
    """One object in a drawn scene."""
    steps = page(graph, photo="Picture with a hole")
    models = full_checkpoint(steps.models, DEMO)
    scene = steps.photo.add("CATDemoScene", height=100, scene="square hole")
    label = object_label(steps.text, "red star", "Colour and shape")
    visual_prompt = semantic_inpaint(
        steps.text, models, image=scene[0], mask=scene[1], text=label[0]
    )
    made = cat_diffusion(
        steps.draw,
        models,
        visual_prompt,
        image=scene[0],
        mask=scene[1],
        label=label[0],
        **SAMPLING,
    )
    finished = put_back(
        steps.result,
        "Put it back",
        destination=scene[0],
        source=made[0],
        mask=scene[1],
    )
    save(steps.result, finished, "cat_demo", height=600)
    steps.guide.note(
        """# Press Run

Nothing to download: the small **demo model** comes with the pack. It knows coloured shapes on drawn
    scenes only, no photographs.

**2** Type another shape: *red*, *green*, *blue*, *yellow*, *orange*, *purple*, *pink*, *white*;
    *circle*, *square*, *triangle*, *star*, *heart*, *ring*, *crescent*, *cross*.

**3** The seed changes with every run.

The grid shows the cells of CLIP's view that the hole covers, and below it what SemInpainter
    predicts there.

For photographs see *cat_weights*.""",
        chinese_note("cat_demo"),
        height=300,
    )


def two_objects(graph: Graph) -> None:
    """Two holes with an object each, painted at once."""
    first_column = graph.column(270)
    guide = first_column.step()
    photo = first_column.step("1 Picture with two holes", "photo")
    first_step = graph.column(280).step("2 First object", "text")
    second_step = graph.column(280).step("3 Second object", "text")
    last = graph.column(400)
    draw = last.step("4 Draw both", "draw")
    result = last.step("5 Result", "result")
    models = full_checkpoint(photo, DEMO)
    first = _hole(photo, "First hole", "upper")
    second = _hole(photo, "Second hole", "lower")
    first_label = object_label(first_step, "red circle", "First object")
    second_label = object_label(second_step, "yellow square", "Second object")
    before = semantic_inpaint(
        first_step,
        models,
        title="First object",
        image=first[0],
        mask=first[1],
        text=first_label[0],
    )
    after = semantic_inpaint(
        second_step,
        models,
        title="Second object",
        image=first[0],
        mask=second[1],
        text=second_label[0],
        previous=before[0],
    )
    both_holes = photo.add(
        "MaskComposite",
        title="Both holes",
        destination=first[1],
        source=second[1],
        x=0,
        y=0,
        operation="add",
    )
    first_prompt = prompt(first_step, "First prompt", models.clip, first_label[0])
    second_prompt = prompt(second_step, "Second prompt", models.clip, second_label[0])
    negative = prompt(draw, "Negative prompt", models.clip, "")
    in_first = _in_hole(first_step, "In the first hole", first_prompt, first)
    in_second = _in_hole(second_step, "In the second hole", second_prompt, second)
    positive = draw.add(
        "ConditioningCombine",
        title="Both prompts",
        conditioning_1=in_first[0],
        conditioning_2=in_second[0],
    )
    adapted = apply_adapter(draw, models, after)
    inputs = draw.add(
        "CATInpaintConditioning",
        title="CAT Conditioning",
        positive=positive[0],
        negative=negative[0],
        vae=models.vae,
        image=first[0],
        mask=both_holes[0],
        fill="black",
        noise_mask=False,
    )
    sampled = sample(
        draw,
        model=adapted[0],
        positive=inputs[0],
        negative=inputs[1],
        latent_image=inputs[2],
        **SAMPLING,
    )
    decoded = decode(draw, sampled, models.vae)
    finished = put_back(
        result, "Put both back", destination=first[0], source=decoded[0], mask=both_holes[0]
    )
    save(result, finished, "cat_two_objects", height=240, first=False)
    guide.note(
        """# Two objects, one run

SemInpainter runs twice: the second **CAT Semantic Inpaint** gets the first one's visual prompt
    at *previous* and builds on it. The U-Net then paints both holes at once; each text holds in
    its own hole only.

This runs on the **demo model**, which knows coloured shapes only. With your own weights replace
    the loader, and the scenes by *Load Image* for the first mask and *Load Image (as Mask)* for
    the second.""",
        chinese_note("cat_two_objects"),
        height=250,
    )


def _hole(step: Step, title: str, place: str) -> PlacedNode:
    return step.add("CATDemoScene", height=100, title=title, scene=f"two holes, the {place}")


def _in_hole(step: Step, title: str, conditioning: PlacedNode, hole: PlacedNode) -> PlacedNode:
    """A text that holds inside a mask only."""
    return step.add(
        "ConditioningSetMask",
        title=title,
        conditioning=conditioning[0],
        mask=hole[1],
        strength=1.0,
        set_cond_area="default",
    )
