"""The example workflows that run on the bundled demo model as they are."""

from release.graph import Graph
from release.workflow_parts import (
    LOADERS,
    MODEL,
    NOTES,
    PROMPTS,
    SAMPLER,
    LoaderOutputs,
    apply_adapter,
    cat_diffusion,
    decode,
    full_checkpoint,
    prompt,
    put_back,
    sample,
    save,
    text,
)
from release.workflow_runs import DEMO

SAMPLING = {"steps": 20, "cfg": 3.0}  # enough for the demo model


def demo(graph: Graph) -> None:
    """One object in a drawn scene."""
    models = full_checkpoint(graph, DEMO)
    scene = graph.add("CATDemoScene", at=(LOADERS, 240), size=(330, 90), scene="square hole")
    label = text(graph, "Object to draw (colour and shape)", "red star", y=400)
    made = cat_diffusion(
        graph,
        models,
        image=scene[0],
        mask=scene[1],
        label=label[0],
        scaled=scene[0],
        **SAMPLING,
    )
    finished = put_back(
        graph,
        "Put it back into the scene",
        at=(SAMPLER, 470),
        destination=scene[0],
        source=made[0],
        mask=scene[1],
    )
    save(graph, finished, "cat_demo")
    graph.note(
        """# Try CAT-Diffusion: press Run

Nothing to download. The **demo model** comes with the pack; it is tiny and knows coloured
    shapes on drawn scenes only. It is there to see every part at work, it cannot do photographs.

Change the object: *red*, *green*, *blue*, *yellow*, *orange*, *purple*, *pink* or *white*;
    *circle*, *square*, *triangle*, *star*, *heart*, *ring*, *crescent* or *cross*.

Change the **scene**, or the seed in KSampler. **CAT Semantic Inpaint** shows which cells of
    CLIP's grid the hole covers, and what it predicts there.

For your own photos see the workflow *cat_weights*.""",
        at=(NOTES, 0),
        size=(390, 420),
    )


def two_objects(graph: Graph) -> None:
    """Two holes with an object each, painted at once."""
    models = full_checkpoint(graph, DEMO)
    first = _hole(graph, "First hole", "upper", y=240)
    second = _hole(graph, "Second hole", "lower", y=400)
    first_label = text(graph, "First object", "red circle", y=560)
    second_label = text(graph, "Second object", "yellow square", y=690)
    before = _semantic_inpaint(
        graph,
        models,
        title="First object",
        at=(PROMPTS, 560),
        image=first[0],
        mask=first[1],
        text=first_label[0],
    )
    after = _semantic_inpaint(
        graph,
        models,
        title="Second object, on top of the first",
        at=(MODEL, 560),
        image=first[0],
        mask=second[1],
        text=second_label[0],
        previous=before[0],
    )
    both_holes = graph.add(
        "MaskComposite",
        at=(LOADERS, 820),
        size=(330, 154),
        title="Both holes",
        destination=first[1],
        source=second[1],
        x=0,
        y=0,
        operation="add",
    )
    first_prompt = prompt(graph, "First object's prompt", models.clip, first_label[0], y=-30)
    second_prompt = prompt(graph, "Second object's prompt", models.clip, second_label[0], y=140)
    negative = prompt(graph, "Negative prompt", models.clip, "", y=310)
    in_first = _in_hole(
        graph,
        "... in the first hole",
        y=-30,
        conditioning=first_prompt[0],
        mask=first[1],
    )
    in_second = _in_hole(
        graph,
        "... in the second hole",
        y=160,
        conditioning=second_prompt[0],
        mask=second[1],
    )
    positive = graph.add(
        "ConditioningCombine",
        at=(MODEL, 350),
        size=(290, 70),
        conditioning_1=in_first[0],
        conditioning_2=in_second[0],
    )
    adapted = apply_adapter(graph, models, after, at=(SAMPLER, 0), size=(330, 182))
    inputs = graph.add(
        "CATInpaintConditioning",
        at=(SAMPLER, 250),
        size=(330, 194),
        positive=positive[0],
        negative=negative[0],
        vae=models.vae,
        image=first[0],
        mask=both_holes[0],
        fill="black",
        noise_mask=False,
    )
    sampled = sample(
        graph,
        y=510,
        model=adapted[0],
        positive=inputs[0],
        negative=inputs[1],
        latent_image=inputs[2],
        **SAMPLING,
    )
    decoded = decode(graph, sampled, models.vae, y=850)
    finished = put_back(
        graph,
        "Put both back",
        at=(SAMPLER, 970),
        destination=first[0],
        source=decoded[0],
        mask=both_holes[0],
    )
    save(graph, finished, "cat_two_objects")
    graph.note(
        """# Two objects, one sampling

SemInpainter runs twice: the second **CAT Semantic Inpaint** gets the first one's visual prompt
    at *previous* and builds on it. CLIP sees neither hole; in the first one the features stay
    those that were predicted there. The U-Net then paints both holes at once.

Each text holds in its own hole only (*Conditioning (Set Mask)*), and both masks together are
    the hole.

This runs on the **demo model**, which knows coloured shapes only. With your own weights replace
    the loader, and the scenes by one *Load Image* with the first mask and one *Load Image (as
    Mask)* with the second.""",
        at=(NOTES, 0),
        size=(390, 470),
    )


def _hole(graph: Graph, title: str, place: str, *, y: int):
    return graph.add(
        "CATDemoScene",
        at=(LOADERS, y),
        size=(330, 90),
        title=title,
        scene=f"two holes, the {place}",
    )


def _semantic_inpaint(graph: Graph, models: LoaderOutputs, **inputs):
    return graph.add(
        "CATSemanticInpaint",
        size=(330, 560),
        cat_model=models.cat_model,
        clip_vision=models.clip_vision,
        clip=models.clip,
        **inputs,
    )


def _in_hole(graph: Graph, title: str, *, y: int, **inputs):
    """A text that holds inside a mask only."""
    return graph.add(
        "ConditioningSetMask",
        at=(MODEL, y),
        size=(290, 130),
        title=title,
        strength=1.0,
        set_cond_area="default",
        **inputs,
    )
