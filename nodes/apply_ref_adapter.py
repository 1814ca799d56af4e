"""Step two of CAT-Diffusion: RefAdapter attention inside the host's own U-Net and samplers."""

import torch
from comfy_api.latest import io

from .host import symbols
from .host.build import build_folded
from .host.cat_model import require_part
from .host.unet import block_name, check_unet, percent_to_sigma
from .wires import CATEGORY, CatModelWire, VisualPromptWire


class RefAdapterPatch(symbols.Patch):
    """Adds the RefAdapters' output between self-attention and text cross-attention.

    That place is the host's `middle_patch`. The object does not change but for what it remembers
    of a sampling: one serves all clones of a model and all samplers.
    """

    def __init__(self, folded, strength: float, sigma_start: float, sigma_end: float):
        self.folded = folded  # ModelPatcher around FoldedRefAdapter
        self.strength = strength
        self.sigma_start = sigma_start
        self.sigma_end = sigma_end
        self._last_call: tuple[torch.Tensor | None, bool] = (None, True)  # sigmas, in range
        self._negatives: set = set()  # ids of conditions that came as negative in this sampling

    @torch.compiler.disable  # a compiled U-Net calls it as it is: settings must not be traced
    def __call__(self, x: torch.Tensor, extra_options: dict) -> torch.Tensor:
        """(B, N, C) hidden states -> the same plus the adapter's output.

        Where nothing is to be added it is x itself.
        """
        if self.strength == 0 or not self._in_range(symbols.noise_levels(extra_options)):
            return x
        chunks = symbols.chunks_of_batch(extra_options)
        self._remember_negatives(chunks)
        block = self.folded.model.block(block_name(extra_options))
        return block(x, [self._is_positive(*chunk) for chunk in chunks], self.strength)

    def _remember_negatives(self, chunks) -> None:
        for kind, condition in chunks:
            if kind != symbols.POSITIVE:
                self._negatives.add(condition)

    def _is_positive(self, kind: int, condition) -> bool:
        """Whether a chunk of the batch belongs to the positive prompt.

        Self-attention guidance and the like run the negative prompt alone, as if it were the
        positive, comfy_extras/nodes_sag.py:174 (uncond); its id tells.
        """
        return kind == symbols.POSITIVE and condition not in self._negatives

    def _in_range(self, sigmas: torch.Tensor | None) -> bool:
        always = self.sigma_end <= 0 and self.sigma_start >= symbols.ANY_SIGMA
        if sigmas is None or always:
            return True
        last_sigmas, in_range = self._last_call
        # All blocks of a call get the same tensor: wait for its value on the GPU only once.
        if last_sigmas is not sigmas:
            in_range = self.sigma_end <= sigmas.max().item() <= self.sigma_start
            self._last_call = (sigmas, in_range)
        return in_range

    def models(self) -> list:
        """Being here, the folded matrices are moved by the host itself; `to` has nothing to do."""
        return [self.folded]

    def cleanup(self) -> None:
        """Forget the sampling."""
        self._negatives.clear()
        self._last_call = (None, True)

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
                    min=-10.0,
                    max=10.0,
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
    patch = RefAdapterPatch(
        build_folded(cat_model, visual_prompt, symbols.compute_dtype(model)),
        strength,
        sigma_start=percent_to_sigma(model, start_percent),
        sigma_end=percent_to_sigma(model, end_percent),
    )
    patched = model.clone()
    symbols.add_middle_patch(patched, patch)
    return patched
