"""SemInpainter and RefAdapter: sizes of the paper, and what the goldens cannot tell."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from paths import GOLDENS
from safetensors.torch import load_file

from cat_diffusion.cat_core import features, weights
from cat_diffusion.cat_core.config import (
    Architecture,
    ArchitectureError,
    RefAdapterConfig,
    SemInpainterConfig,
    unet_blocks,
)
from cat_diffusion.cat_core.models.folded import UNCONDITIONAL, FoldedBlock, fold, runs_of
from cat_diffusion.cat_core.models.ref_adapter import RefAdapter, RefAdapterBlock
from cat_diffusion.cat_core.models.sem_inpainter import SemInpainter

TINY = SemInpainterConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    grid_size=16,
    text_size=24,
    text_intermediate_size=48,
    spatial_intermediate_size=64,
    global_intermediate_size=64,
)
BLOCKS = RefAdapterConfig(
    visual_size=32,
    num_heads=4,
    blocks=(
        ("input_blocks.1.1.transformer_blocks.0", 40),
        ("middle_block.1.transformer_blocks.0", 80),
    ),
)


def random_(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return module.requires_grad_(False)


def test_full_size_has_every_official_key_shape_and_parameter():
    shapes = json.loads((GOLDENS / "official_checkpoint_shapes.json").read_text())
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    parts, unknown = weights.sort_keys(tensors)
    assert not unknown
    architecture = Architecture(
        sem_inpainter=SemInpainterConfig.from_tensors(parts["sem_inpainter"]),
        ref_adapter=RefAdapterConfig.from_tensors(parts["ref_adapter"]),
    )
    assert architecture.sem_inpainter == SemInpainterConfig()
    assert architecture.ref_adapter.blocks == unet_blocks(parts["unet"])
    assert len(architecture.ref_adapter.blocks) == 16
    sizes = {}
    for part, module in weights.cat_modules(architecture, device="meta").items():
        state = module.state_dict()
        assert state.keys() == parts[part].keys()
        for key, tensor in state.items():
            assert tensor.shape == parts[part][key].shape
        sizes[part] = sum(parameter.numel() for parameter in module.parameters())
    assert sizes == {"sem_inpainter": 324_872_192, "ref_adapter": 50_377_280}


def test_blocks_are_in_natural_order():
    widths = {"output_blocks.9.1": 3, "output_blocks.10.1": 4, "middle_block.1": 2}
    tensors = {}
    for name in sorted(widths):
        tensors[f"{name}.transformer_blocks.0.norm1.weight"] = torch.empty(widths[name])
    assert unet_blocks(tensors) == (
        ("middle_block.1.transformer_blocks.0", 2),
        ("output_blocks.9.1.transformer_blocks.0", 3),
        ("output_blocks.10.1.transformer_blocks.0", 4),
    )


@pytest.mark.parametrize(
    "dtype, stored, computed", [(torch.float16, 1e-3, 4e-3), (torch.bfloat16, 1e-2, 4e-2)]
)
def test_half_precision_stays_near_the_goldens(dtype, stored, computed):
    """Of the largest value.

    Weights in half precision computed in fp32, as the nodes do, and all of it in half precision.
    """
    heads = json.loads((GOLDENS / "index.json").read_text())["tiny_fusion"]["num_attention_heads"]
    tensors = weights.sort_keys(load_file(GOLDENS / "fusion_tiny.safetensors"))[0]["sem_inpainter"]
    model = SemInpainter(SemInpainterConfig.from_tensors(tensors, heads))
    model.requires_grad_(False).eval()
    halves = {key: tensor.to(dtype).float() for key, tensor in tensors.items()}
    cases = load_file(GOLDENS / "fusion_cases.safetensors")
    for case in {key.split(".")[0] for key in cases}:
        golden = cases[f"{case}.out.spatial_raw"]
        for compute, bound in ((torch.float32, stored), (dtype, computed)):
            model.float().load_state_dict(halves)
            predicted = model.to(compute)(
                patches=cases[f"{case}.clip_x"][:, 1:].to(compute),
                image=cases[f"{case}.global_clip_x"][:, 0].to(compute),
                text=cases[f"{case}.prompt_pool"][:, 0].to(compute),
                patch_mask=cases[f"{case}.mask16"].to(compute),
            )
            difference = predicted.patches.float() - golden
            error = difference.abs().max() / golden.abs().max()
            print(f"{case}, weights {dtype}, computed in {compute}: {error:.1e}")
            assert 0 < error <= bound


def batches(x, conditional):
    """Runs of as many batches of latents under each other as `conditional` has entries."""
    latents = len(x) // len(conditional)
    rows = []
    for looks in conditional:
        rows += range(latents) if looks else [UNCONDITIONAL] * latents
    return runs_of(rows)


def test_a_zero_visual_prompt_adds_exactly_the_bias():
    adapter = random_(RefAdapter(BLOCKS))
    block = adapter.block("input_blocks.1.1.transformer_blocks.0")
    x = torch.randn(2, 9, 40)
    bias = block.attn3.out.bias
    assert torch.equal(block(x, torch.zeros(2, 64, 32)), bias.expand(2, 9, 40))
    folded = fold(block, torch.zeros(1, 64, 32), torch.float32)
    assert torch.equal(folded(x, batches(x, [False])), x + bias)
    assert torch.allclose(folded(x, batches(x, [True])), x + bias, atol=1e-6)


# (width, tokens, heads): folded, folded, keys and values kept
SHAPES = [(80, 16, 4), (640, 64, 8), (40, 64, 4)]


def block_and_reference(width, tokens, heads, dtype, x, prompts, conditional, strength):
    """An adapter in `dtype`, and x with what it adds unfolded, in its own precision and in fp64."""
    block = random_(RefAdapterBlock(width, 32, heads)).to(dtype)
    with torch.no_grad():
        block.norm4.weight += 1
    latents = len(x) // len(conditional)
    prompt_of_latent = prompts[torch.arange(latents) % len(prompts)]
    rows = torch.cat([prompt_of_latent * looks for looks in conditional])
    unfolded = x + strength * block(x, rows)
    block_64 = copy.deepcopy(block).double()
    exact = x.double() + strength * block_64(x.double(), rows.double())
    return block, unfolded, exact


@pytest.mark.parametrize("width, tokens, heads", SHAPES)
@pytest.mark.parametrize("prompts, latents", [(1, 1), (1, 3), (3, 3), (2, 4), (3, 2), (2, 3)])
@pytest.mark.parametrize(
    "conditional", [[True], [False], [True, False], [False, True, True, False]]
)
def test_folding_changes_nothing(width, tokens, heads, prompts, latents, conditional):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(latents * len(conditional), 9, width, generator=generator)
    prompts = torch.randn(prompts, tokens, 32, generator=generator)
    before = x.clone()
    block, unfolded, _ = block_and_reference(
        width, tokens, heads, torch.float32, x, prompts, conditional, -0.7
    )
    folded = fold(block, prompts, torch.float32)
    assert isinstance(folded, FoldedBlock) == ((width, tokens, heads) != SHAPES[2])
    out = folded(x, batches(x, conditional), -0.7)
    assert torch.equal(x, before)
    assert (out - unfolded).abs().max() <= 1e-5 * (unfolded - x).abs().max()


def test_rows_in_runs():
    """A new run where the kind changes or the latents start again."""
    rows = [UNCONDITIONAL, UNCONDITIONAL, 0, 2, 3, 3, 1, UNCONDITIONAL, 0]
    runs = runs_of(rows)
    assert [run.latents for run in runs] == [[-1, -1], [0, 2, 3], [3], [1], [-1], [0]]
    assert [run.rows for run in runs] == [2, 3, 1, 1, 1, 1]
    assert [run.conditional for run in runs] == [False, True, True, True, False, True]


@pytest.mark.parametrize("width, tokens, heads", SHAPES)
@pytest.mark.parametrize(
    "latents",
    [[2, 3], [3, 0, 1], [1, 3], [0, 1, 2, 3, 4, 5], [4, 5, 6], [UNCONDITIONAL, 3, UNCONDITIONAL]],
)
def test_rows_in_any_order_look_at_their_own_prompts(width, tokens, heads, latents):
    """As context windows and tiles bring them, against each row alone."""
    generator = torch.Generator().manual_seed(3)
    block = random_(RefAdapterBlock(width, 32, heads))
    prompts = torch.randn(4, tokens, 32, generator=generator)
    folded = fold(block, prompts, torch.float32)
    x = torch.randn(len(latents), 9, width, generator=generator)
    out = folded(x, runs_of(latents), 0.5)
    again = folded(x, runs_of(latents), 0.5)
    assert torch.equal(out, again)
    for row, latent in enumerate(latents):
        tokens_seen = torch.zeros(1, tokens, 32)
        if latent != UNCONDITIONAL:
            tokens_seen = prompts[latent % 4][None]
        alone = x[row : row + 1]
        expected = alone + 0.5 * block(alone, tokens_seen)
        assert torch.allclose(out[row : row + 1], expected, atol=1e-5)


@pytest.mark.parametrize("width, tokens, heads", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_folding_is_no_worse_in_half_precision(width, tokens, heads, dtype, scale):
    """Against fp64 on the same halves, for flat and for sharp attention."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, 64, width, generator=generator).to(dtype)
    own = torch.randn(1, tokens, 32, generator=generator)
    shared = torch.randn(1, 1, 32, generator=generator)
    prompts = (scale * (own + 2 * shared)).to(dtype)
    block, unfolded, exact = block_and_reference(
        width, tokens, heads, dtype, x, prompts, [True], 1.0
    )
    out = fold(block, prompts, dtype)(x, batches(x, [True]))
    assert out.dtype == dtype
    error = (out.double() - exact).norm().item()
    error_unfolded = (unfolded.double() - exact).norm().item()
    print(f"folded / unfolded error {error / error_unfolded:.2f}")
    # Flat attention: both lose almost only what the last rounding takes.
    assert error <= 1.01 * error_unfolded


def test_hidden_states_may_be_of_another_type_and_layout_than_the_folded_matrices():
    folded = fold(random_(RefAdapterBlock(80, 32, 4)), torch.randn(1, 16, 32), torch.float32)
    x = torch.randn(2, 80, 9).transpose(1, 2)
    runs = batches(x, [True, False])
    whole = folded(x, runs)
    assert torch.equal(whole, folded(x.contiguous(), runs))
    half = folded(x.bfloat16(), runs)
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), whole, atol=0.1)
    assert torch.equal(whole, folded(x, runs))


def test_an_adapter_knows_only_its_own_blocks():
    with pytest.raises(KeyError):
        RefAdapter(BLOCKS).block("input_blocks.1.1")


def test_blend_and_pool_keep_what_is_outside():
    observed = torch.randn(1, 256, 32)
    predicted = torch.randn(1, 256, 32)
    mask = torch.zeros(1, 1, 16, 16)
    assert torch.equal(features.blend(predicted, observed, mask), observed)
    assert torch.equal(features.blend(predicted, observed, mask + 1), predicted)
    mask[0, 0, 2:4, 6:8] = 1  # exactly the pooled cell (1, 3), row-major
    before = features.pool(observed)
    after = features.pool(features.blend(predicted, observed, mask))
    assert (before != after).any(dim=2).nonzero().tolist() == [[0, 1 * 8 + 3]]
    mean = predicted.view(16, 16, 32)[2:4, 6:8].mean((0, 1))
    assert torch.allclose(after[0, 11], mean, atol=1e-6)


def test_rows_of_a_batch_do_not_see_each_other():
    model = random_(SemInpainter(TINY))
    inputs = (
        torch.randn(3, 256, 32),
        torch.randn(3, 32),
        torch.randn(3, 24),
        torch.rand(3, 1, 16, 16).round(),
    )
    together = model(*inputs)
    for i in range(3):
        alone = model(*(x[i : i + 1] for x in inputs))
        for whole, single in zip(together, alone, strict=True):
            assert torch.allclose(whole[i : i + 1], single, atol=1e-4)


def test_operations_and_attention_can_be_injected():
    calls = []

    class Linear(torch.nn.Linear):
        def forward(self, x):
            calls.append("linear")
            return super().forward(x)

    def attention(q, k, v, heads):
        calls.append("attention")
        return v

    ops = SimpleNamespace(
        Linear=Linear,
        LayerNorm=torch.nn.LayerNorm,
        Embedding=torch.nn.Embedding,
    )
    model = SemInpainter(TINY, ops=ops, attention=attention)
    model(
        patches=torch.randn(1, 256, 32),
        image=torch.randn(1, 32),
        text=torch.randn(1, 24),
        patch_mask=torch.zeros(1, 1, 16, 16),
    )
    assert calls.count("attention") == 2
    assert calls.count("linear") == 2 * 3 + 2 * 6


def test_architecture_survives_the_header_and_nothing_else_passes():
    architecture = Architecture(
        TINY, BLOCKS, unet_num_heads=4, clip_text_num_heads=4, clip_vision_num_heads=4
    )
    assert Architecture.from_json(architecture.to_json()) == architecture
    for text in (
        "",
        "{",
        "[]",
        '{"sem_inpainter": {"hidden": 3}}',
        '{"ref_adapter": {"blocks": 1}}',
        '{"new": 1}',
    ):
        with pytest.raises(ArchitectureError):
            Architecture.from_json(text)
