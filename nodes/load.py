"""Loaders: a full official checkpoint, or a CAT weights file beside stock SD 1.5 inpainting."""

from typing import NamedTuple

from comfy_api.latest import io

from ..cat_core.weights import CAT_PARTS, PREFIXES
from .checks import odd_name
from .host import memory, messages, model_files
from .host.build import build_cat_model, build_clip, build_clip_vision, build_unet, build_vae
from .host.cat_model import CatModel
from .wires import CATEGORY, CatModelWire

FULL = "a full CAT-Diffusion checkpoint"
PARTS = "a CAT weights file"


class Models(NamedTuple):
    """What a full checkpoint holds, as the host's wires carry it; in the order of the outputs."""

    model: object  # MODEL: the U-Net, without RefAdapter
    clip: object
    vae: object
    clip_vision: object
    cat_model: CatModel


def load_full_checkpoint(path) -> Models:
    """Build every part of a full checkpoint; raises ValueError for any other file."""
    # Large parts first: the file's pages of a part are in memory, too, while the part is built.
    builders = {
        "unet": build_unet,
        "cat_model": build_cat_model,
        "clip_vision": build_clip_vision,
        "clip_text": build_clip,
        "vae": build_vae,
    }
    bar = messages.progress_bar(1 + len(builders))
    built = {}
    with messages.plain_errors(), memory.collector_paused():
        file = model_files.read_path(path)
        file.require(*PREFIXES)
        for name, build in builders.items():
            bar.update(1)
            built[name] = build(file)
            file = file.without(*(CAT_PARTS if name == "cat_model" else (name,)))
    bar.update(1)
    return Models(
        model=built["unet"],
        clip=built["clip_text"],
        vae=built["vae"],
        clip_vision=built["clip_vision"],
        cat_model=built["cat_model"],
    )


def _absence(name, of_input: str, what: str) -> str | None:
    """A sentence about a name that is none, or whose file is not there; or None."""
    return odd_name(of_input, name) or model_files.missing_file(name, what)


def _present(name, of_input: str, what: str) -> str:
    """The name of a file that is there; raises ValueError if it is not."""
    sentence = _absence(name, of_input, what)
    if sentence:
        raise ValueError(sentence)
    return name


def _is_full(parts: set[str]) -> bool:
    return parts >= set(PREFIXES)


def _has_cat_parts(parts: set[str]) -> bool:
    return not parts.isdisjoint(CAT_PARTS)


class CATLoadCheckpoint(io.ComfyNode):
    """A full CAT-Diffusion checkpoint: everything in one file."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CATLoadCheckpoint",
            display_name="CAT Load Checkpoint",
            category=f"{CATEGORY}/loaders",
            search_aliases=[
                "cat-diffusion checkpoint",
                "load cat model",
                "demo model",
                "加载CAT模型",
            ],
            description="Load a full CAT-Diffusion checkpoint: "
            "U-Net, text encoder, VAE, CLIP vision and the CAT parts.",
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=model_files.list_files(_is_full, pickles=True),
                    tooltip="A full checkpoint in models/cat_diffusion (.safetensors or .ckpt), or "
                    "the pack's cat_demo_model, which knows coloured shapes only.",
                )
            ],
            outputs=[
                io.Model.Output(
                    tooltip="The fine-tuned inpainting U-Net, still without RefAdapter."
                ),
                io.Clip.Output(
                    tooltip="The text encoder, for prompts and for CAT Semantic Inpaint."
                ),
                io.Vae.Output(tooltip="The VAE."),
                io.ClipVision.Output(
                    tooltip="The image encoder that SemInpainter was trained with."
                ),
                CatModelWire.Output(
                    display_name="CAT_MODEL", tooltip="SemInpainter and RefAdapter."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, checkpoint):
        # None where another node supplies it.
        return checkpoint is None or _absence(checkpoint, "checkpoint", FULL) or True

    @classmethod
    def fingerprint_inputs(cls, checkpoint):
        return model_files.fingerprint(_present(checkpoint, "checkpoint", FULL))

    @classmethod
    def execute(cls, checkpoint) -> io.NodeOutput:
        name = _present(checkpoint, "checkpoint", FULL)
        return io.NodeOutput(*load_full_checkpoint(model_files.full_path(name)))


class CATLoadWeights(io.ComfyNode):
    """The CAT parts alone, to use with models loaded elsewhere."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CATLoadWeights",
            display_name="CAT Load Weights",
            category=f"{CATEGORY}/loaders",
            search_aliases=["load seminpainter", "load refadapter", "cat weights", "加载权重"],
            description="Load SemInpainter and/or RefAdapter from a CAT weights file. "
            "Model, CLIP, VAE and CLIP vision come from ComfyUI's own loaders.",
            inputs=[
                io.Combo.Input(
                    "weights",
                    options=model_files.list_files(_has_cat_parts),
                    tooltip="A CAT weights file in models/cat_diffusion (.safetensors).",
                )
            ],
            outputs=[
                CatModelWire.Output(
                    display_name="CAT_MODEL", tooltip="The parts that the file holds."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, weights):
        # None where another node supplies it.
        return weights is None or _absence(weights, "weights", PARTS) or True

    @classmethod
    def fingerprint_inputs(cls, weights):
        return model_files.fingerprint(_present(weights, "weights", PARTS))

    @classmethod
    def execute(cls, weights) -> io.NodeOutput:
        with messages.plain_errors():
            file = model_files.read(_present(weights, "weights", PARTS))
            cat_model = build_cat_model(file)
        sentences = [messages.sentence("{cat_model}", cat_model=cat_model)]
        if "unet_lora" in file.parts:
            sentences.append(
                messages.sentence(
                    "The LoRA in this file is left out: write it with tools/convert.py --lora, and "
                    "put Load LoRA before CAT Apply RefAdapter."
                )
            )
        messages.say(*sentences)
        return io.NodeOutput(cat_model)
