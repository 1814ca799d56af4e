"""The example workflows, each written twice: for the canvas (workflows/*.json) and for scripts (workflows/api/*.json).

    python tools/workflows.py [--thumbnails]

Asks a real ComfyUI for the nodes' inputs, so that links and widgets are in the order that it expects. --thumbnails also runs
every workflow on the demo model and keeps the picture.
"""

import argparse
import json
import tempfile
import uuid
from pathlib import Path

from release.workflow_runs import DEMO, FOLDER, examples, thumbnail

PACK, CORE = {"cnr_id": "cat-diffusion", "ver": "0.2.0"}, {"cnr_id": "comfy-core", "ver": "0.16.3"}
HUGGING_FACE = "https://huggingface.co/"
# Files that ComfyUI can offer to download. CAT weights are not among them: nobody has published any.
MODELS = {
    "sd-v1-5-inpainting.ckpt": (
        "checkpoints",
        "stable-diffusion-v1-5/stable-diffusion-inpainting/resolve/main/sd-v1-5-inpainting.ckpt",
    ),
    "clip_vit_large_patch14.safetensors": (
        "clip_vision",
        "openai/clip-vit-large-patch14/resolve/main/model.safetensors",
    ),
    "control_v11p_sd15_canny_fp16.safetensors": (
        "controlnet",
        "comfyanonymous/ControlNet-v1-1_fp16_safetensors/resolve/main/"
        "control_v11p_sd15_canny_fp16.safetensors",
    ),
}


class Graph:
    """A workflow under construction; `info` is the host's /object_info."""

    def __init__(self, info: dict):
        self.info, self.nodes, self.links, self.notes = info, {}, [], []

    def add(self, kind: str, pos, size, title: str | None = None, **inputs) -> "Node":
        """Place a node; an input is a value or another node's output, such as node[0]."""
        unknown = set(inputs) - set(self.specs(kind))
        if unknown:
            raise ValueError(
                f"{kind} has no input {', '.join(unknown)}; expected {', '.join(self.specs(kind))}"
            )
        defaults = {
            name: spec[1]["default"]
            for name, spec in self.specs(kind).items()
            if "default" in (spec[1:] or [{}])[0]
        }
        node = Node(len(self.nodes) + 1, kind, pos, size, title, defaults | inputs)
        self.nodes[node.id] = node
        return node

    def note(self, pos, size, text: str) -> None:
        self.notes.append((pos, size, text))

    def specs(self, kind: str) -> dict:
        inputs = self.info[kind]["input"]
        return inputs["required"] | inputs.get("optional", {})

    def api(self) -> dict:
        """What scripts post to /prompt."""
        return {
            str(node.id): {
                "class_type": node.kind,
                **({"_meta": {"title": node.title}} if node.title else {}),
                "inputs": {
                    name: [str(value[0]), value[1]] if isinstance(value, tuple) else value
                    for name in self.specs(node.kind)
                    if (value := node.inputs.get(name)) is not None
                },
            }
            for node in self.nodes.values()
        }

    def canvas(self, name: str) -> dict:
        """What is dropped onto the canvas."""
        self.links = []
        nodes = {node.id: self._node(order, node) for order, node in enumerate(self.nodes.values())}
        for node in self.nodes.values():
            for slot, (input_, spec) in enumerate(self.specs(node.kind).items()):
                value = node.inputs.get(input_)
                if isinstance(value, tuple):
                    link, origin = len(self.links) + 1, nodes[value[0]]["outputs"][value[1]]
                    self.links.append([link, value[0], value[1], node.id, slot, origin["type"]])
                    origin["links"].append(link)
                    nodes[node.id]["inputs"][slot]["link"] = link
        last = len(nodes)
        notes = [
            {
                "id": last + number,
                "type": "MarkdownNote",
                "pos": list(pos),
                "size": list(size),
                "flags": {},
                "order": last + number - 1,
                "mode": 0,
                "inputs": [],
                "outputs": [],
                "title": "Note",
                "properties": {},
                "widgets_values": [text],
                "color": "#432",
                "bgcolor": "#653",
            }
            for number, (pos, size, text) in enumerate(self.notes, 1)
        ]
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"cat-diffusion/{name}")),
            "revision": 0,
            "last_node_id": last + len(notes),
            "last_link_id": len(self.links),
            "nodes": [*nodes.values(), *notes],
            "links": self.links,
            "groups": [],
            "config": {},
            "extra": {},
            "version": 0.4,
        }

    def _node(self, order: int, node: "Node") -> dict:
        info, inputs, values = self.info[node.kind], [], []
        for name, spec in self.specs(node.kind).items():
            type_, options = (
                ("COMBO" if isinstance(spec[0], list) else spec[0]),
                (spec[1] if len(spec) > 1 else {}),
            )
            inputs.append({"name": name, "type": type_, "link": None})
            if type_ in ("COMBO", "INT", "FLOAT", "STRING", "BOOLEAN"):
                inputs[-1]["widget"] = {"name": name}
                value = node.inputs.get(name)
                values.append(options.get("default", "") if isinstance(value, tuple) else value)
                values += ["fixed"] * bool(options.get("control_after_generate")) + [
                    "image"
                ] * bool(options.get("image_upload"))
        given = (
            [] if info["output_node"] and not node.kind.startswith("CAT") else info["output"]
        )  # older hosts' savers have none
        outputs = [
            {"name": name, "type": type_, "links": []}
            for name, type_ in zip(info["output_name"], given)
        ]
        properties = {
            "Node name for S&R": node.kind,
            **(PACK if node.kind.startswith("CAT") else CORE),
        }
        models = [
            {"name": value, "url": HUGGING_FACE + MODELS[value][1], "directory": MODELS[value][0]}
            for value in node.inputs.values()
            if isinstance(value, str) and value in MODELS
        ]
        return {
            "id": node.id,
            "type": node.kind,
            "pos": list(node.pos),
            "size": list(node.size),
            "flags": {},
            "order": order,
            "mode": 0,
            "inputs": inputs,
            "outputs": outputs,
            "properties": properties | ({"models": models} if models else {}),
            "widgets_values": values,
            **({"title": node.title} if node.title else {}),
        }


class Node:
    """A placed node; node[2] is its third output."""

    def __init__(self, id: int, kind: str, pos, size, title, inputs):
        self.id, self.kind, self.pos, self.size, self.title, self.inputs = (
            id,
            kind,
            pos,
            size,
            title,
            inputs,
        )

    def __getitem__(self, output: int) -> tuple[int, int]:
        return self.id, output


# The workflows ------------------------------------------------------------------------------------------------------

X = (0, 390, 780, 1150, 1540)  # columns
PAINT = "right-click it, *Open in Mask Editor*, paint where the object goes, save"


def demo(graph: Graph) -> None:
    loader = graph.add("CATLoadCheckpoint", (X[0], 0), (330, 170), checkpoint=DEMO)
    scene = graph.add("CATDemoScene", (X[0], 240), (330, 90), scene="square hole")
    label = graph.add(
        "PrimitiveString",
        (X[0], 400),
        (330, 70),
        "Object to draw (colour and shape)",
        value="red star",
    )
    made, _ = _cat(
        graph,
        loader[0],
        loader[1],
        loader[2],
        loader[3],
        loader[4],
        scene[0],
        scene[1],
        label[0],
        scene[0],
        20,
        3.0,
    )
    back = graph.add(
        "ImageCompositeMasked",
        (X[3], 470),
        (330, 158),
        "Put it back into the scene",
        destination=scene[0],
        source=made[0],
        mask=scene[1],
        x=0,
        y=0,
        resize_source=True,
    )
    graph.add("SaveImage", (X[4], 0), (440, 540), images=back[0], filename_prefix="cat_demo")
    graph.note(
        (-440, 0),
        (390, 420),
        """# Try CAT-Diffusion: press Run

Nothing to download. The **demo model** comes with the pack; it is tiny and knows coloured shapes on drawn scenes only. It is there to see every part at work, it cannot do photographs.

Change the object: *red*, *green*, *blue*, *yellow*, *orange*, *purple*, *pink* or *white*; *circle*, *square*, *triangle*, *star*, *heart*, *ring*, *crescent* or *cross*.

Change the **scene**, or the seed in KSampler. **CAT Semantic Inpaint** shows which cells of CLIP's grid the hole covers, and what it predicts there.

For your own photos see the workflow *cat_weights*.""",
    )


def inpaint(graph: Graph) -> None:
    loader = graph.add(
        "CATLoadCheckpoint", (X[0], 0), (330, 170), checkpoint="cat_diffusion.safetensors"
    )
    photo = graph.add("LoadImage", (X[0], 240), (330, 400), "Photo and mask", image="example.png")
    label = graph.add(
        "PrimitiveString", (X[0], 710), (330, 70), "Object to paint (type its name)", value="spoon"
    )
    _photo(
        graph, loader[0], loader[1], loader[2], loader[3], loader[4], photo, label, "cat_inpaint"
    )
    graph.note(
        (-440, 0),
        (390, 470),
        f"""# Paint a named object into a photo

1. **CAT Load Checkpoint**: choose your full CAT-Diffusion checkpoint. It belongs into the folder **models/cat_diffusion**; press R after copying it there. Nobody has published one yet: train it with the pack, or try the workflow *cat_demo*.
2. **Photo and mask**: pick a picture of any size, {PAINT}.
3. **Object to paint**: type its name, for example *fire hydrant*.
4. Press **Run**. Outside the mask the photo stays exactly as it is.

**CAT Semantic Inpaint** predicts what CLIP would see if the object were there. **CAT Apply RefAdapter** shows that to the sampler; lower its strength to follow the prompt more and the scene less.""",
    )


def weights(graph: Graph) -> None:
    base, vision, cat, photo, label = _stock(graph)
    _photo(graph, base[0], base[1], base[2], vision[0], cat[0], photo, label, "cat_weights")
    graph.note(
        (-440, 0),
        (390, 560),
        f"""# CAT weights on Stable Diffusion 1.5 Inpainting

Three files:
1. **models/checkpoints**: SD 1.5 *inpainting* (9 input channels), here *sd-v1-5-inpainting.ckpt*.
2. **models/clip_vision**: CLIP ViT-L/14, here *clip_vit_large_patch14.safetensors*.
3. **models/cat_diffusion**: CAT weights (SemInpainter and RefAdapter). Nobody has published any: train them with the pack, or look at *cat_demo* first.

Press R after copying files.

Then: **Photo and mask**: {PAINT}. **Object to paint**: its name. **Run**.

Outside the mask the photo stays exactly as it is. **Soft edge** lets the new object fade in over a few pixels *inside* the mask. An object that sits too tightly in its mask: add *Grow Mask* after the photo.""",
    )


def compare(graph: Graph) -> None:
    base, vision, cat, photo, label = _stock(graph)
    scaled, soft, back = _photo(
        graph, base[0], base[1], base[2], vision[0], cat[0], photo, label, None
    )
    y = 1120
    positive, negative = (
        graph.add(
            "CLIPTextEncode", (X[1], y + 170 * row), (300, 102), title, clip=base[1], text=text
        )
        for row, (title, text) in enumerate(
            (("Positive prompt, plain", label[0]), ("Negative prompt, plain", ""))
        )
    )
    plain = graph.add(
        "InpaintModelConditioning",
        (X[2], y),
        (290, 150),
        positive=positive[0],
        negative=negative[0],
        vae=base[2],
        pixels=scaled[0],
        mask=photo[1],
        noise_mask=False,
    )
    sampled = graph.add(
        "KSampler",
        (X[3], y),
        (330, 270),
        "Plain SD 1.5 inpainting",
        model=base[0],
        positive=plain[0],
        negative=plain[1],
        latent_image=plain[2],
        **SAMPLING,
    )
    decoded = graph.add("VAEDecode", (X[3], y + 340), (330, 54), samples=sampled[0], vae=base[2])
    other = graph.add(
        "ImageCompositeMasked",
        (X[3], y + 460),
        (330, 158),
        "Put it back into the photo, plain",
        destination=photo[0],
        source=decoded[0],
        mask=soft[0],
        x=0,
        y=0,
        resize_source=True,
    )
    both = graph.add(
        "ImageStitch",
        (X[4], y),
        (330, 150),
        "Left plain, right CAT",
        image1=other[0],
        direction="right",
        match_image_size=True,
        spacing_width=8,
        spacing_color="white",
        image2=back[0],
    )
    graph.add("SaveImage", (X[4], 0), (560, 540), images=both[0], filename_prefix="cat_compare")
    graph.note(
        (-440, 0),
        (390, 400),
        """# CAT-Diffusion against plain inpainting

The same photo, mask, text, seed and steps, once with Stable Diffusion 1.5 Inpainting alone (lower half) and once with CAT-Diffusion (upper half). Left in the result is plain, right is CAT.

Both samplers should have the same seed and steps: change them in both.

Plain inpainting gets the masked photo with a grey hole as it was trained, CAT one with a black hole.""",
    )


def reference(graph: Graph) -> None:
    base, vision, cat, photo, label = _stock(graph)
    picture = graph.add(
        "LoadImage", (X[1], 520), (300, 400), "Reference picture of the object", image="example.png"
    )
    prompt = graph.add(
        "CATEncodeVisualPrompt", (X[2], 700), (290, 80), clip_vision=vision[0], image=picture[0]
    )
    graph.add("CATVisualPromptPreview", (X[2], 850), (330, 240), visual_prompt=prompt[0])
    _photo(
        graph, base[0], base[1], base[2], vision[0], cat[0], photo, label, "cat_reference", prompt
    )
    graph.note(
        (-440, 0),
        (390, 400),
        f"""# A picture instead of a prediction

The visual prompt comes from a **reference picture** of the object instead of SemInpainter. CLIP squeezes it to a square and the RefAdapter sees it as if it were the whole photo: a reference that shows the object at the place and in the size it should have works best.

**Photo and mask**: {PAINT}. **Object to paint** still goes to the text prompt.""",
    )


def lora_controlnet(graph: Graph) -> None:
    base, vision, cat, photo, label = _stock(graph)
    lora = graph.add(
        "LoraLoader",
        (X[0], -270),
        (330, 130),
        model=base[0],
        clip=base[1],
        lora_name="your_style_lora.safetensors",
        strength_model=0.8,
        strength_clip=0.8,
    )
    sketch = graph.add(
        "LoadImage", (X[1], 1130), (300, 400), "Picture whose edges to follow", image="example.png"
    )
    edges = graph.add(
        "Canny", (X[2], 1030), (290, 90), image=sketch[0], low_threshold=0.4, high_threshold=0.8
    )
    control = graph.add(
        "ControlNetLoader",
        (X[2], 1180),
        (290, 60),
        control_net_name="control_v11p_sd15_canny_fp16.safetensors",
    )
    _photo(
        graph,
        lora[0],
        lora[1],
        base[2],
        vision[0],
        cat[0],
        photo,
        label,
        "cat_lora_controlnet",
        control=(control, edges),
    )
    graph.note(
        (-440, 0),
        (390, 400),
        """# With LoRA and ControlNet

CAT-Diffusion is a patch on the model, so everything else goes on working: a **LoRA** before it (SD 1.5), a **ControlNet** on the conditioning.

The edges must belong to the photo's frame: best take the photo itself with a rough sketch of the object drawn in. LoRA and ControlNet are for SD 1.5; choose your own LoRA.""",
    )


def two_objects(graph: Graph) -> None:
    loader = graph.add("CATLoadCheckpoint", (X[0], 0), (330, 170), checkpoint=DEMO)
    first, second = (
        graph.add(
            "CATDemoScene",
            (X[0], 240 + 160 * i),
            (330, 90),
            f"{name} hole",
            scene=f"two holes, the {place}",
        )
        for i, (name, place) in enumerate((("First", "upper"), ("Second", "lower")))
    )
    one, two = (
        graph.add(
            "PrimitiveString", (X[0], 560 + 130 * i), (330, 70), f"{name} object", value=value
        )
        for i, (name, value) in enumerate((("First", "red circle"), ("Second", "yellow square")))
    )
    before = graph.add(
        "CATSemanticInpaint",
        (X[1], 560),
        (330, 560),
        "First object",
        cat_model=loader[4],
        clip_vision=loader[3],
        clip=loader[1],
        image=first[0],
        mask=first[1],
        text=one[0],
    )
    after = graph.add(
        "CATSemanticInpaint",
        (X[2], 560),
        (330, 560),
        "Second object, on top of the first",
        cat_model=loader[4],
        clip_vision=loader[3],
        clip=loader[1],
        image=first[0],
        mask=second[1],
        text=two[0],
        previous=before[0],
    )
    both = graph.add(
        "MaskComposite",
        (X[0], 820),
        (330, 154),
        "Both holes",
        destination=first[1],
        source=second[1],
        x=0,
        y=0,
        operation="add",
    )
    conditions = [
        graph.add(
            "CLIPTextEncode", (X[1], -30 + 170 * i), (300, 102), title, clip=loader[1], text=text
        )
        for i, (title, text) in enumerate(
            (
                ("First object's prompt", one[0]),
                ("Second object's prompt", two[0]),
                ("Negative prompt", ""),
            )
        )
    ]
    areas = [
        graph.add(
            "ConditioningSetMask",
            (X[2], -30 + 190 * i),
            (290, 130),
            title,
            conditioning=condition[0],
            mask=mask,
            strength=1.0,
            set_cond_area="default",
        )
        for i, (title, condition, mask) in enumerate(
            (
                ("... in the first hole", conditions[0], first[1]),
                ("... in the second hole", conditions[1], second[1]),
            )
        )
    ]
    texts = graph.add(
        "ConditioningCombine",
        (X[2], 350),
        (290, 70),
        conditioning_1=areas[0][0],
        conditioning_2=areas[1][0],
    )
    model = graph.add(
        "CATApplyRefAdapter",
        (X[3], 0),
        (330, 182),
        model=loader[0],
        cat_model=loader[4],
        visual_prompt=after[0],
        strength=1.0,
        start_percent=0.0,
        end_percent=1.0,
    )
    inputs = graph.add(
        "CATInpaintConditioning",
        (X[3], 250),
        (330, 194),
        positive=texts[0],
        negative=conditions[2][0],
        vae=loader[2],
        image=first[0],
        mask=both[0],
        fill="black",
        noise_mask=False,
    )
    sampled = graph.add(
        "KSampler",
        (X[3], 510),
        (330, 270),
        model=model[0],
        positive=inputs[0],
        negative=inputs[1],
        latent_image=inputs[2],
        **SAMPLING | {"steps": 20, "cfg": 3.0},
    )
    decoded = graph.add("VAEDecode", (X[3], 850), (330, 54), samples=sampled[0], vae=loader[2])
    back = graph.add(
        "ImageCompositeMasked",
        (X[3], 970),
        (330, 158),
        "Put both back",
        destination=first[0],
        source=decoded[0],
        mask=both[0],
        x=0,
        y=0,
        resize_source=True,
    )
    graph.add("SaveImage", (X[4], 0), (440, 540), images=back[0], filename_prefix="cat_two_objects")
    graph.note(
        (-440, 0),
        (390, 470),
        """# Two objects, one sampling

SemInpainter runs twice: the second **CAT Semantic Inpaint** gets the first one's visual prompt at *previous* and builds on it. CLIP sees neither hole; in the first one the features stay those that were predicted there. The U-Net then paints both holes at once.

Each text holds in its own hole only (*Conditioning (Set Mask)*), and both masks together are the hole.

This runs on the **demo model**, which knows coloured shapes only. With your own weights replace the loader, and the scenes by one *Load Image* with the first mask and one *Load Image (as Mask)* with the second.""",
    )


def crop(graph: Graph) -> None:
    base, vision, cat, photo, label = _stock(graph)
    x, y, side = (
        graph.add("PrimitiveInt", (X[0], 1080 + 130 * i), (330, 82), title, value=value)
        for i, (title, value) in enumerate(
            (
                ("Left edge of the crop", 64),
                ("Upper edge of the crop", 64),
                ("Side of the crop", 256),
            )
        )
    )
    box = graph.add(
        "PrimitiveBoundingBox",
        (X[0], 1480),
        (330, 154),
        x=x[0],
        y=y[0],
        width=side[0],
        height=side[0],
    )
    part = graph.add("ImageCropV2", (X[1], -440), (300, 380), image=photo[0], crop_region=box[0])
    hole = graph.add(
        "CropMask",
        (X[2], -240),
        (290, 154),
        mask=photo[1],
        x=x[0],
        y=y[0],
        width=side[0],
        height=side[0],
    )
    scaled, soft, back = _photo(
        graph, base[0], base[1], base[2], vision[0], cat[0], (part[0], hole[0]), label, None
    )
    whole = graph.add(
        "ImageCompositeMasked",
        (X[4], 600),
        (330, 158),
        "Put the crop back into the photo",
        destination=photo[0],
        source=back[0],
        x=x[0],
        y=y[0],
        resize_source=False,
    )
    graph.add("SaveImage", (X[4], 0), (560, 540), images=whole[0], filename_prefix="cat_crop")
    graph.note(
        (-440, 0),
        (390, 500),
        f"""# A small object in a large photo

SD 1.5 works at 512x512. In a large photo a small hole would be only a few cells of CLIP's 16x16 grid, and the object would lack detail. So a square around the hole is cropped, scaled up, painted, scaled down and put back.

1. **Photo and mask**: {PAINT}.
2. **Left edge**, **upper edge** and **side of the crop**, in pixels of the photo: choose a square two to three times as wide as the hole, inside the photo.
3. The little grid on *CAT Semantic Inpaint* shows the covered cells after the first run.

Everything here but the CAT nodes is ComfyUI's own.""",
    )


def training(graph: Graph) -> None:
    vision = graph.add(
        "CLIPVisionLoader", (X[0], 0), (330, 60), clip_name="clip_vit_large_patch14.safetensors"
    )
    base = graph.add(
        "CheckpointLoaderSimple", (X[0], 130), (330, 100), ckpt_name="sd-v1-5-inpainting.ckpt"
    )
    trained = graph.add(
        "CATTrainSemInpainter",
        (X[1], 0),
        (400, 420),
        clip_vision=vision[0],
        clip=base[1],
        folder="my_examples",
    )
    photo = graph.add(
        "LoadImage",
        (X[0], 300),
        (330, 400),
        "A test photo, its object under the mask",
        image="example.png",
    )
    label = graph.add("PrimitiveString", (X[0], 770), (330, 70), "Its object's name", value="spoon")
    graph.add(
        "CATCompareFeatures",
        (860, 0),
        (420, 420),
        cat_model=trained[0],
        clip_vision=vision[0],
        clip=base[1],
        image=photo[0],
        mask=photo[1],
        text=label[0],
    )
    graph.add("PreviewImage", (860, 490), (420, 300), "Loss", images=trained[1])
    graph.note(
        (-440, 0),
        (390, 520),
        """# Train SemInpainter on a folder

1. Make a folder in ComfyUI's **input** folder, here *my_examples*. Each example is three files: *NAME.jpg*, *NAME_mask.png* (white = object) and *NAME.txt* (its name). Press R.
2. Choose it in **CAT Train SemInpainter**. Start small: 300 steps.
3. Press **Run**: the loss is drawn while it trains. Cancel keeps the weights so far. The result is a file in **models/cat_diffusion** and goes on in the graph.
4. **CAT Compare Features** hides the object of a photo that was *not* in the folder. *predicted* above *observed* means that SemInpainter has learned something.

Needs **accelerate** in ComfyUI's Python. A folder of a few dozen pictures teaches the handling, not a general model: the paper trained on millions of objects for 40,000 steps of 128.""",
    )


WORKFLOWS = {
    "cat_demo": demo,
    "cat_weights": weights,
    "cat_inpaint": inpaint,
    "cat_compare": compare,
    "cat_reference": reference,
    "cat_lora_controlnet": lora_controlnet,
    "cat_two_objects": two_objects,
    "cat_crop": crop,
    "cat_train": training,
}
SAMPLING = {
    "seed": 0,
    "steps": 50,
    "cfg": 7.5,
    "sampler_name": "ddim",
    "scheduler": "ddim_uniform",
    "denoise": 1.0,
}


def _stock(graph: Graph):
    """ComfyUI's own loaders and the CAT weights."""
    base = graph.add(
        "CheckpointLoaderSimple", (X[0], 0), (330, 100), ckpt_name="sd-v1-5-inpainting.ckpt"
    )
    vision = graph.add(
        "CLIPVisionLoader", (X[0], 220), (330, 60), clip_name="clip_vit_large_patch14.safetensors"
    )
    cat = graph.add("CATLoadWeights", (X[0], 380), (330, 60), weights="cat_diffusion.safetensors")
    photo = graph.add("LoadImage", (X[0], 540), (330, 330), "Photo and mask", image="example.png")
    label = graph.add(
        "PrimitiveString", (X[0], 940), (330, 70), "Object to paint (type its name)", value="spoon"
    )
    return base, vision, cat, photo, label


def _cat(
    graph: Graph,
    model,
    clip,
    vae,
    vision,
    cat,
    image,
    mask,
    label,
    scaled,
    steps: int,
    cfg: float,
    prompt=None,
    control=None,
):
    """Prompts, visual prompt, conditioning, sampler, decoder; returns (decoded picture, visual prompt)."""
    positive = graph.add(
        "CLIPTextEncode", (X[1], 0), (300, 102), "Positive prompt", clip=clip, text=label
    )
    negative = graph.add(
        "CLIPTextEncode", (X[1], 170), (300, 102), "Negative prompt", clip=clip, text=""
    )
    if prompt is None:
        prompt = graph.add(
            "CATSemanticInpaint",
            (X[1], 500),
            (330, 560),
            cat_model=cat,
            clip_vision=vision,
            clip=clip,
            image=image,
            mask=mask,
            text=label,
        )
    adapted = graph.add(
        "CATApplyRefAdapter",
        (X[2], 0),
        (310, 182),
        model=model,
        cat_model=cat,
        visual_prompt=prompt[0],
        strength=1.0,
        start_percent=0.0,
        end_percent=1.0,
    )
    inputs = graph.add(
        "CATInpaintConditioning",
        (X[2], 250),
        (310, 194),
        positive=positive[0],
        negative=negative[0],
        vae=vae,
        image=scaled,
        mask=mask,
        fill="black",
        noise_mask=False,
    )
    conditions = inputs
    if control:
        net, hint = control
        conditions = graph.add(
            "ControlNetApplyAdvanced",
            (X[2], 510),
            (310, 190),
            positive=inputs[0],
            negative=inputs[1],
            control_net=net[0],
            image=hint[0],
            strength=0.6,
            start_percent=0.0,
            end_percent=0.8,
        )
    sampled = graph.add(
        "KSampler",
        (X[3], 0),
        (330, 270),
        model=adapted[0],
        positive=conditions[0],
        negative=conditions[1],
        latent_image=inputs[2],
        **SAMPLING | {"steps": steps, "cfg": cfg},
    )
    return graph.add("VAEDecode", (X[3], 340), (330, 54), samples=sampled[0], vae=vae), prompt


def _photo(
    graph: Graph,
    model,
    clip,
    vae,
    vision,
    cat,
    photo,
    label,
    name: str | None,
    prompt=None,
    control=None,
):
    """CAT-Diffusion on a photo of any size, put back with a soft edge; saved where there is a name.

    Returns the scaled photo, the soft mask, and the finished picture.
    """
    image, mask = photo[0], photo[1]
    scale = graph.add(
        "ImageScaleToTotalPixels",
        (X[1], 320),
        (300, 114),
        "Scale to the size of SD 1.5",
        image=image,
        upscale_method="lanczos",
        megapixels=0.25,
        resolution_steps=8,
    )
    made, _ = _cat(
        graph,
        model,
        clip,
        vae,
        vision,
        cat,
        image,
        mask,
        label[0],
        scale[0],
        50,
        7.5,
        prompt,
        control,
    )
    shrunk = graph.add(
        "GrowMask",
        (X[3], 450),
        (330, 86),
        "Soft edge, inwards",
        mask=mask,
        expand=-4,
        tapered_corners=False,
    )  # the blur is a square, too
    picture = graph.add("MaskToImage", (X[3], 610), (330, 30), mask=shrunk[0])
    blurred = graph.add(
        "ImageBlur", (X[3], 710), (330, 86), image=picture[0], blur_radius=4, sigma=2.0
    )
    soft = graph.add("ImageToMask", (X[3], 860), (330, 60), image=blurred[0], channel="red")
    back = graph.add(
        "ImageCompositeMasked",
        (X[4], 600 if name else 850),
        (330, 158),
        "Put it back into the photo",
        destination=image,
        source=made[0],
        mask=soft[0],
        x=0,
        y=0,
        resize_source=True,
    )
    if name:
        graph.add("SaveImage", (X[4], 0), (440, 540), images=back[0], filename_prefix=name)
    return scale, soft, back


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--thumbnails", action="store_true", help="also run them and write their pictures"
    )
    parser.add_argument(
        "--only", choices=WORKFLOWS, nargs="+", default=list(WORKFLOWS), help="these instead of all"
    )
    arguments = parser.parse_args()
    from comfyui.local_server import LocalServer, make_base

    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        make_base(base)
        examples(base / "input/my_examples")
        with LocalServer(base, "--cpu", "--use-pytorch-cross-attention") as server:
            info = server.get("/object_info")
            for name in arguments.only:
                graph = Graph(info)
                WORKFLOWS[name](graph)
                (FOLDER / f"api/{name}.json").write_text(lines(graph.api()))
                (FOLDER / f"{name}.json").write_text(
                    json.dumps(graph.canvas(name), indent=1, ensure_ascii=False) + "\n"
                )
                if arguments.thumbnails:
                    thumbnail(server, name)
                print(name, flush=True)
    return 0


def lines(prompt: dict) -> str:
    """JSON with a node a line."""
    return (
        "{\n"
        + ",\n".join(
            f"  {json.dumps(id)}: {json.dumps(node, ensure_ascii=False)}"
            for id, node in prompt.items()
        )
        + "\n}\n"
    )
