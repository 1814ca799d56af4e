"""Step two of CAT-Diffusion: RefAdapter attention inside the host's own U-Net and samplers."""

import torch
from comfy_api.latest import io

from .checks import check_number, check_wires
from .host import symbols
from .host.build import build_folded
from .host.cat_model import require_part
from .host.sampled_rows import OneSampling, sampling_of, watch_samplings
from .host.unet import block_name, check_unet
from .wires import CATEGORY, CatModelWire, VisualPromptWire

LARGEST_STRENGTH = 10.0


class RefAdapterPatch(symbols.Patch):
    """Adds the RefAdapters' output between self-attention and text cross-attention.

    That place is the host's `middle_patch`. The object does not change: one serves all clones of a
    model and all samplers.

    Args:
        folded: ModelPatcher around FoldedRefAdapter.
        outside: what holds where the U-Net is called without a guider.
        picture_size: side of the pictures that the model was trained on, where that is known.
    """

    def __init__(
        self,
        folded,
        strength: float,
        start_percent: float,
        end_percent: float,
        outside: OneSampling,
        picture_size: int | None = None,
    ):
        self.folded = folded
        self.strength = strength
        self.start_percent = start_percent
        self.end_percent = end_percent
        self.outside = outside
        self.picture_size = picture_size

    @torch.compiler.disable  # a compiled U-Net calls it as it is: settings must not be traced
    def __call__(self, x: torch.Tensor, extra_options: dict) -> torch.Tensor:
        """(B, N, C) hidden states -> the same plus the adapter's output.

        Where nothing is to be added it is x itself.
        """
        if self.strength == 0:
            return x
        sampling = sampling_of(extra_options) or self.outside
        if not sampling.is_between(self.start_percent, self.end_percent, extra_options):
            return x
        sampling.say_where_too_large(self.picture_size)
        block = self.folded.model.block(block_name(extra_options))
        return block(x, sampling.runs(extra_options, len(x), block.prompts), self.strength)

    def models(self) -> list:
        """Being here, the folded matrices are moved by the host itself; `to` has nothing to do."""
        return [self.folded]

    def __deepcopy__(self, memo):
        return self


class CATApplyRefAdapter(io.ComfyNode):
    """RefAdapter attention onto a visual prompt, in a clone of an SD 1.5 inpainting model."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CATApplyRefAdapter",
            display_name="CAT Apply RefAdapter",
            category=CATEGORY,
            search_aliases=[
                "visual prompt attention",
                "patch model",
                "ip-adapter",
                "refadapter",
                "视觉提示",
            ],
            description="Let the sampler look at the visual prompt. "
            "Works with any sampler, LoRA and ControlNet.",
            inputs=[
                io.Model.Input("model", tooltip="An SD 1.5 inpainting model (9 input channels)."),
                CatModelWire.Input("cat_model", tooltip="A CAT model with a RefAdapter."),
                VisualPromptWire.Input(
                    "visual_prompt",
                    tooltip="From CAT Semantic Inpaint or CAT Encode Visual Prompt.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-LARGEST_STRENGTH,
                    max=LARGEST_STRENGTH,
                    step=0.05,
                    tooltip="How much of the adapter's output is added. "
                    "1 as trained, 0 leaves the model alone.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Share of the sampling at which the adapter sets in.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Share of the sampling at which the adapter stops.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The patched model, for any sampler.")],
        )

    @classmethod
    def execute(
        cls, model, cat_model, visual_prompt, strength, start_percent, end_percent
    ) -> io.NodeOutput:
        patched = apply_ref_adapter(
            model, cat_model, visual_prompt, strength, start_percent, end_percent
        )
        return io.NodeOutput(patched)


def apply_ref_adapter(
    model, cat_model, visual_prompt, strength=1.0, start_percent=0.0, end_percent=1.0
):
    """A clone of the MODEL that looks at the visual prompt; raises ValueError if they do not fit.

    Args:
        strength: factor of the adapter's output; 1 as trained.
        start_percent, end_percent: the part of the sampling in which it is added, in [0, 1].
    """
    check_wires(model=model, cat_model=cat_model, visual_prompt=visual_prompt)
    check_number("strength", strength, -LARGEST_STRENGTH, LARGEST_STRENGTH)
    check_number("start_percent", start_percent, 0, 1)
    check_number("end_percent", end_percent, 0, 1)
    require_part(cat_model, "ref_adapter")
    config = cat_model.architecture.ref_adapter
    check_unet(model, config)
    width = visual_prompt.tokens.shape[2]
    if width != config.visual_size:
        raise ValueError(
            f"The visual prompt is {width} wide, the RefAdapter expects {config.visual_size}. "
            "Load SemInpainter and RefAdapter from one CAT file, "
            "with the CLIP vision they were trained on."
        )
    if start_percent > end_percent:
        raise ValueError(
            f"start_percent is {start_percent}, after end_percent {end_percent}. Set it below."
        )
    patched = model.clone()
    watch_samplings(patched)
    patch = RefAdapterPatch(
        build_folded(cat_model, visual_prompt, symbols.compute_dtype(model)),
        strength,
        start_percent,
        end_percent,
        outside=OneSampling(symbols.noise_schedule(model)),
        picture_size=cat_model.knowledge.picture_size,
    )
    symbols.add_middle_patch(patched, patch)
    return patched
