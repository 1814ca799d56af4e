"""Step two of CAT-Diffusion: RefAdapter attention inside the host's own U-Net and samplers."""

import torch
from comfy_api.latest import io

from .host.build import build_folded
from .host.cat_model import require_part
from .host.unet import ANY_SIGMA, block_name, check_unet, compute_dtype, percent_to_sigma
from .wires import CATEGORY, CatModelWire, VisualPromptWire


class RefAdapterPatch:
    """Adds the RefAdapters' output between self-attention and text cross-attention (the host's `middle_patch`).

    Immutable but for what it remembers of a sampling: one object serves all clones of a model and all samplers.
    """

    def __init__(self, folded, strength: float, sigma_start: float, sigma_end: float):
        self.folded = folded  # ModelPatcher around FoldedRefAdapter
        self.strength = strength
        self.sigma_start, self.sigma_end = sigma_start, sigma_end
        self._range: tuple[torch.Tensor | None, bool] = (None, True)
        self._negative: set = set()  # ids of conditions that came as unconditional in this sampling

    @torch.compiler.disable  # a compiled U-Net calls it as it is: settings must not be traced
    def __call__(self, x: torch.Tensor, extra_options: dict) -> torch.Tensor:
        """(B, N, C) hidden states -> the same plus the adapter's output; x itself where nothing is to be added."""
        if self.strength == 0 or not self._in_range(extra_options.get("sigmas")):
            return x
        block = self.folded.model.block(block_name(extra_options))
        return block(x, self._positive(extra_options), self.strength)

    def _positive(self, extra_options) -> list[bool]:
        """Which chunks belong to the positive prompt. Self-attention guidance and the like run the negative one alone,
        as if it were the positive; its id tells."""
        conds = extra_options.get("cond_or_uncond", [0])  # 0 is the positive prompt
        ids = extra_options.get("uuids", conds)
        self._negative.update(id for cond, id in zip(conds, ids) if cond != 0)
        return [cond == 0 and id not in self._negative for cond, id in zip(conds, ids)]

    def _in_range(self, sigmas: torch.Tensor | None) -> bool:
        if sigmas is None or (self.sigma_end <= 0 and self.sigma_start >= ANY_SIGMA):
            return True
        seen, inside = self._range
        if (
            seen is not sigmas
        ):  # the same tensor for all blocks of a call: wait for its value only once
            inside = self.sigma_end <= sigmas.max().item() <= self.sigma_start
            self._range = (sigmas, inside)
        return inside

    def models(self):
        """The host loads these together with the U-Net, counts them to the byte and unloads them."""
        return [self.folded]

    def to(self, device_or_dtype):
        """The host moves the folded matrices itself, as models()."""
        return self

    def cleanup(self):
        """Called by the host after each sampling."""
        self._negative.clear()
        self._range = (None, True)

    def __deepcopy__(self, memo):
        return self


class CATApplyRefAdapter(io.ComfyNode):
    """Patch a clone of an SD 1.5 inpainting model with RefAdapter attention onto a visual prompt."""

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
            description="Let the sampler look at the visual prompt. Works with any sampler, LoRA and ControlNet.",
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
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How much of the adapter's output is added. 1 as trained, 0 leaves the model alone.",
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
        require_part(cat_model, "ref_adapter")
        config = cat_model.architecture.ref_adapter
        check_unet(model, config)
        width = visual_prompt.tokens.shape[2]
        if width != config.visual_size:
            raise ValueError(
                f"The visual prompt is {width} wide, the RefAdapter expects {config.visual_size}. "
                "Load SemInpainter and RefAdapter from one CAT file, with the CLIP vision they were trained on."
            )
        if start_percent > end_percent:
            raise ValueError(
                f"start_percent is {start_percent}, after end_percent {end_percent}. Set it below."
            )
        patched = model.clone()
        sigmas = (percent_to_sigma(model, percent) for percent in (start_percent, end_percent))
        folded = build_folded(cat_model, visual_prompt, compute_dtype(model))
        patched.set_model_patch(RefAdapterPatch(folded, strength, *sigmas), "middle_patch")
        return io.NodeOutput(patched)
