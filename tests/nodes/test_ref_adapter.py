"""RefAdapter inside the host's U-Net, through the host's own sampler."""

import copy
import dataclasses
import gc
import weakref

import comfy.model_management as management
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_model_advanced import ModelSamplingContinuousEDM, ModelSamplingDiscrete
from comfy_extras.nodes_sag import SelfAttentionGuidance

from cat_diffusion.cat_core.knowledge import Knowledge
from cat_diffusion.cat_core.models import folded
from cat_diffusion.nodes.apply_ref_adapter import RefAdapterPatch
from cat_diffusion.nodes.host import symbols
from cat_diffusion.nodes.host.build import build_unet
from cat_diffusion.nodes.host.unet import block_name

FIRST_BLOCK = "input_blocks.1.1.transformer_blocks.0"
POSITIVE = symbols.POSITIVE
NEGATIVE = 1


def options(*kinds, sigma=1.0):
    """What a patch gets from the U-Net's first transformer block, for these chunks of a batch."""
    return {
        "block": ("input", 1),
        "block_index": 0,
        "cond_or_uncond": list(kinds),
        "sigmas": torch.tensor([sigma]),
    }


def hidden_states(rows, dtype=torch.float32):
    """(B, N, C) as in the first transformer block."""
    return torch.randn(rows, 16, 32, dtype=dtype)


def patch_of(model) -> RefAdapterPatch:
    """The first patch of a model."""
    return symbols.middle_patches(model)[0]


class UnfoldedPatch(symbols.Patch):
    """The adapter as the paper has it, with nothing folded: what the right result is."""

    def __init__(self, adapter, tokens):
        self.adapter = adapter
        self.tokens = tokens

    def __call__(self, x, extra_options):
        kinds = extra_options["cond_or_uncond"]
        latents = torch.arange(len(x) // len(kinds))
        tokens = self.tokens[latents % len(self.tokens)]  # latent i looks at prompt i modulo P
        seen = [tokens if kind == POSITIVE else torch.zeros_like(tokens) for kind in kinds]
        block = self.adapter.block(block_name(extra_options))
        return x + block(x, torch.cat(seen))


@pytest.fixture
def unfolded(models, prompt):
    """A model with UnfoldedPatch."""

    def unfolded(visual_prompt=prompt):
        model = models.model.clone()
        adapter = models.cat_model.ref_adapter.model
        symbols.add_middle_patch(model, UnfoldedPatch(adapter, visual_prompt.tokens))
        return model

    return unfolded


@pytest.fixture
def blocks(models) -> int:
    """How many transformer blocks the U-Net has."""
    return len(models.cat_model.architecture.ref_adapter.blocks)


@pytest.fixture
def counted(monkeypatch):
    """Counts calls: `folds` of blocks, `rows` of each attention."""
    counts = {"folds": 0, "rows": []}
    prepare = folded.PromptedBlock.__init__

    def count_folds(self, *args):
        counts["folds"] += 1
        prepare(self, *args)

    def counting(attend):
        def count_rows(self, x, *args):
            counts["rows"].append(len(x))
            attend(self, x, *args)

        return count_rows

    monkeypatch.setattr(folded.PromptedBlock, "__init__", count_folds)
    for form in (folded.FoldedBlock, folded.CachedBlock):
        monkeypatch.setattr(form, "attend", counting(form.attend))
    return counts


def trace(model, sample, **kwargs):
    """(latent, [kinds of the chunks, denoised] of each call of the U-Net) of a sampling."""
    calls = []

    def wrapper(apply_model, arguments):
        out = apply_model(arguments["input"], arguments["timestep"], **arguments["c"])
        calls.append((list(arguments["cond_or_uncond"]), out))
        return out

    traced = model.clone()
    traced.set_model_unet_function_wrapper(wrapper)
    return sample(traced, **kwargs), calls


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


# What it adds ---------------------------------------------------------------------------------


def test_it_changes_the_result_and_seeds_reproduce(models, apply, sample):
    plain = sample(models.model)
    adapted = sample(apply())
    assert (plain - adapted).abs().max() > 1e-2
    assert torch.equal(adapted, sample(apply()))
    assert not torch.equal(adapted, sample(apply(), seed=2))
    assert adapted.isfinite().all()


@pytest.mark.parametrize(
    "sampler", ["ddim", "euler_ancestral", "dpmpp_2m", "heun", "uni_pc", "lcm"]
)
def test_every_sampler_makes_what_the_unfolded_adapter_makes(apply, unfolded, sample, sampler):
    settings = {"sampler": sampler, "scheduler": "karras", "steps": 3}
    assert_close(sample(apply(), **settings), sample(unfolded(), **settings))


def test_strength_0_is_bit_identical_to_the_plain_model(models, apply, sample):
    assert torch.equal(sample(models.model), sample(apply(strength=0.0)))


def test_unconditional_rows_take_the_bias_only(models, apply, sample, counted, prompt):
    model = apply()
    _, calls = trace(model, sample, steps=2)
    # Both prompts are in one call of the U-Net, yet only the positive row attends.
    assert {tuple(sorted(kinds)) for kinds, _ in calls} == {(POSITIVE, NEGATIVE)}
    assert set(counted["rows"]) == {1}
    block = models.cat_model.ref_adapter.model.block(FIRST_BLOCK)
    x = hidden_states(2)
    out = patch_of(model)(x, options(NEGATIVE, POSITIVE))
    assert torch.equal(out[0], x[0] + block.attn3.to_out[0].bias)
    assert torch.allclose(out[1:], x[1:] + block(x[1:], prompt.tokens), atol=1e-5)


def test_half_precision_hidden_states_keep_their_type(apply):
    patch = patch_of(apply())
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        out = patch(hidden_states(2, dtype), options(POSITIVE, NEGATIVE))
        assert out.dtype == dtype
        assert out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_unet_samples_nearly_the_same(models, apply, sample, monkeypatch, dtype):
    monkeypatch.setattr(management, "unet_dtype", lambda **kwargs: dtype)
    monkeypatch.setattr(management, "unet_manual_cast", lambda *args, **kwargs: None)
    half = build_unet(models.file)
    assert half.model.get_dtype() == dtype
    matrices = patch_of(apply(half)).folded.model.parameters()
    assert {matrix.dtype for matrix in matrices} == {dtype}
    whole = sample(apply())
    approximate = sample(apply(half))
    assert approximate.isfinite().all()
    assert (whole - approximate).abs().mean() < 0.1 * whole.abs().mean()


# When -----------------------------------------------------------------------------------------


def test_an_empty_range_is_bit_identical_to_the_plain_model(models, apply, sample):
    assert torch.equal(sample(models.model), sample(apply(start=0.0, end=0.0)))


@pytest.mark.parametrize(
    "start, end, active",
    [
        (0.0, 0.5, [True, True, False, False]),
        (0.5, 1.0, [False, False, True, True]),
        (0.3, 0.6, [False, True, False, False]),
    ],
)
def test_steps_outside_the_range_are_bit_identical(
    models, apply, sample, counted, blocks, start, end, active
):
    patched = apply(start=start, end=end)
    _, plain = trace(models.model, sample, steps=4)
    _, limited = trace(patched, sample, steps=4)
    assert len(limited) == len(plain) == 4
    first_active = active.index(True)
    for step in range(first_active):  # the inputs are still the same here, so the outputs must be
        assert torch.equal(limited[step][1], plain[step][1])
    assert not torch.equal(limited[first_active][1], plain[first_active][1])
    counted["rows"].clear()
    sample(patched, steps=4)
    assert len(counted["rows"]) == sum(active) * blocks


def test_late_steps_outside_the_range_run_the_plain_unet(apply):
    """The same input at a noise level past the end, and at one before it."""
    patch = patch_of(apply(end=0.5))
    x = hidden_states(2)
    assert patch(x, options(POSITIVE, NEGATIVE, sigma=0.05)) is x
    assert not torch.equal(patch(x, options(POSITIVE, NEGATIVE, sigma=14.0)), x)


@pytest.mark.parametrize(
    "node, settings",
    [(ModelSamplingDiscrete, ("eps", True)), (ModelSamplingContinuousEDM, ("eps", 120.0, 0.002))],
)
def test_the_range_is_of_the_model_that_samples(models, apply, sample, node, settings):
    """A node that changes the noise levels may stand before or after the adapter."""
    steps = {"scheduler": "normal", "steps": 6}
    (changed,) = node().patch(models.model, *settings)
    before = sample(apply(changed, start=0.39, end=0.65), **steps)
    (after,) = node().patch(apply(start=0.39, end=0.65), *settings)
    assert torch.equal(sample(after, **steps), before)
    assert not torch.equal(sample(changed, **steps), before)


# For whom -------------------------------------------------------------------------------------


def test_cfg_1_runs_the_conditional_row_alone(models, apply, sample):
    latent, calls = trace(apply(), sample, cfg=1.0)
    assert {tuple(kinds) for kinds, _ in calls} == {(POSITIVE,)}
    assert not torch.equal(latent, sample(models.model, cfg=1.0))


def test_low_memory_runs_both_prompts_apart_with_the_same_result(
    models, apply, sample, monkeypatch
):
    together = sample(apply())
    monkeypatch.setattr(models.model.model, "memory_required", lambda *args, **kwargs: 1e20)
    apart, calls = trace(apply(), sample)
    assert {tuple(kinds) for kinds, _ in calls} == {(POSITIVE,), (NEGATIVE,)}
    assert_close(apart, together)


def test_a_batch_of_prompts_equals_single_runs(apply, stack):
    """N prompts go with N latents row by row; fewer prompts repeat; one serves all."""
    x = hidden_states(8)
    chunks = options(NEGATIVE, POSITIVE)
    single = [patch_of(apply(visual_prompt=stack(factor))) for factor in (1.0, -2.0)]
    many = patch_of(apply(visual_prompt=stack(1.0, -2.0)))(x, chunks)
    for row in range(4):
        rows = [row, 4 + row]
        one = single[row % 2](x[rows], chunks)
        assert torch.allclose(many[rows], one, atol=1e-5)
    everything = single[0](x, chunks)
    assert torch.allclose(everything[4:5], single[0](x[[0, 4]], chunks)[1:], atol=1e-5)


@pytest.mark.parametrize("prompts, latents", [(1, 3), (3, 3), (2, 4), (3, 1)])
def test_batches_of_latents(apply, unfolded, sample, stack, conditioned, prompts, latents):
    latent = {"samples": conditioned[2]["samples"].repeat(latents, 1, 1, 1)}
    visual_prompt = stack(*range(1, prompts + 1))
    out = sample(apply(visual_prompt=visual_prompt), latent=latent)
    assert len(out) == latents
    assert_close(out, sample(unfolded(visual_prompt), latent=latent))


@pytest.fixture
def with_area(conditioned):
    """The positive prompt, and once more for a part of the picture."""
    corner = {"area": (4, 4, 2, 2), "strength": 1.0, "set_area_to_bounds": False}
    return [*conditioned[0], *([text, {**values, **corner}] for text, values in conditioned[0])]


def test_area_conditioning_crops_the_latent_and_still_works(apply, sample, with_area):
    latent, calls = trace(apply(), sample, positive=with_area)
    assert {tuple(out.shape[-2:]) for _, out in calls} == {(8, 8), (4, 4)}
    assert latent.isfinite().all()


def test_an_area_looks_at_the_visual_prompt(apply, unfolded, sample, with_area):
    assert_close(sample(apply(), positive=with_area), sample(unfolded(), positive=with_area))


def test_rows_of_several_positive_chunks_keep_their_prompts(apply, stack):
    """Combined or area conditioning at cfg 1 puts several positive chunks under each other."""
    patch = patch_of(apply(visual_prompt=stack(1.0, -2.0)))
    x = hidden_states(2)
    for latents in (x[:1], x, x.repeat(2, 1, 1)):
        count = len(latents)
        single = patch(latents, options(POSITIVE))
        double = patch(latents.repeat(2, 1, 1), options(POSITIVE, POSITIVE))
        triple = patch(latents.repeat(3, 1, 1), options(POSITIVE, NEGATIVE, POSITIVE))
        assert torch.allclose(double[:count], single, atol=1e-5)
        assert torch.allclose(double[count:], single, atol=1e-5)
        assert torch.allclose(triple[:count], single, atol=1e-5)
        assert torch.allclose(triple[2 * count :], single, atol=1e-5)


def test_self_attention_guidance_keeps_its_unconditional_pass_unconditional(
    apply, sample, counted, blocks
):
    """The stock node runs the negative prompt alone, which looks like a positive one."""
    (guided,) = SelfAttentionGuidance.execute(apply(), 0.5, 2.0).args
    latent, calls = trace(guided, sample, steps=3)
    assert any(kinds == [POSITIVE] for kinds, _ in calls)
    assert latent.isfinite().all()
    assert len(counted["rows"]) == sum(len(kinds) == 2 for kinds, _ in calls) * blocks


# Beside others --------------------------------------------------------------------------------


def test_one_patched_model_in_two_samplers_and_again(apply, sample):
    model = apply()
    euler = {"sampler": "euler", "scheduler": "normal", "steps": 2}
    first = sample(model)
    other = sample(model, **euler)
    assert torch.equal(first, sample(model))
    assert torch.equal(other, sample(model.clone(), **euler))


def test_several_adapters_on_one_model(apply, sample, stack):
    one = apply()
    two = apply(apply(), visual_prompt=stack(-3.0))
    assert len(symbols.middle_patches(one)) == 1
    assert len(symbols.middle_patches(two)) == 2
    assert not torch.equal(sample(one), sample(two))
    assert torch.equal(sample(one), sample(apply(apply(), strength=0.0)))


def test_clones_and_deep_copies_share_the_patch(apply):
    model = apply()
    patch = patch_of(model)
    assert patch_of(model.clone()) is patch
    assert copy.deepcopy(patch) is patch
    assert patch.to("cpu") is patch
    assert patch.to(torch.float16) is patch


def test_the_original_model_is_left_alone(models, apply):
    apply()
    assert symbols.middle_patches(models.model) == []


def test_it_works_next_to_other_patches(models, apply, sample):
    model = models.model.clone()
    model.set_model_attn2_output_patch(lambda x, options: x * 0.5)
    model.set_model_sampler_post_cfg_function(lambda arguments: arguments["denoised"] * 0.9)
    alone = sample(model)
    both = sample(apply(model))
    assert both.isfinite().all()
    assert not torch.equal(alone, both)
    assert torch.equal(alone, sample(apply(model, strength=0.0)))


def test_wrappers_of_the_host_see_the_patched_model(apply, sample):
    """Other packs wrap APPLY_MODEL; the patch must not depend on being called directly."""
    calls = []

    def wrapper(executor, *args, **kwargs):
        calls.append(executor)
        return executor(*args, **kwargs)

    plain = sample(apply())
    model = apply()
    model.add_wrapper(WrappersMP.APPLY_MODEL, wrapper)
    assert torch.equal(sample(model), plain)
    assert calls


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_and_follows_a_new_strength(apply, sample):
    for strength in (1.0, -0.5):
        model = apply(strength=strength)
        plain = sample(model, steps=2)
        set_torch_compile_wrapper(model, backend="eager")
        assert_close(sample(model, steps=2), plain)


# What it keeps --------------------------------------------------------------------------------


def test_the_visual_prompt_is_folded_once_for_all_samplings(apply, sample, counted, blocks):
    model = apply()
    sample(model, steps=5)
    sample(model, seed=2, steps=1)
    assert counted["folds"] == blocks
    assert len(counted["rows"]) == 6 * blocks


def test_changing_the_strength_loads_none_of_the_models_again(models, apply, sample, monkeypatch):
    sample(apply())
    loads = []
    for patcher in (models.model, models.cat_model.ref_adapter, models.cat_model.sem_inpainter):

        def count(*args, load=patcher.load, **kwargs):
            loads.append(load)
            return load(*args, **kwargs)

        monkeypatch.setattr(patcher, "load", count)
    half, whole, opposite = (sample(apply(strength=strength)) for strength in (0.5, 1.0, -1.0))
    assert not torch.equal(half, whole)
    assert not torch.equal(whole, opposite)
    assert not loads


def test_the_folded_matrices_load_with_the_model_and_the_adapter_itself_does_not(models, apply):
    patchers = apply().model_patches_models()
    assert [type(patcher.model).__name__ for patcher in patchers] == ["FoldedRefAdapter"]
    adapter = {id(weight) for weight in models.cat_model.ref_adapter.model.parameters()}
    matrices = {id(matrix) for matrix in patchers[0].model.parameters()}
    assert not adapter & matrices


def loaded_models():
    """The host's entries by class of model, without those whose model is gone already."""
    entries = {}
    for entry in management.current_loaded_models:
        if entry.model is not None:
            entries[type(entry.model.model).__name__] = entry
    return entries


def test_the_host_counts_them_to_the_byte_and_nothing_stays_after_unloading(apply, sample):
    """What the patch holds is in the one model that it names; after that nothing is left."""
    management.unload_all_models()  # other tests' models
    model = apply()
    sample(model)
    patch = patch_of(model)
    size = 0
    for matrix in patch.folded.model.parameters():
        size += matrix.numel() * matrix.element_size()
    loaded = loaded_models()
    assert loaded["FoldedRefAdapter"].model is patch.folded
    assert loaded["FoldedRefAdapter"].model_loaded_memory() == patch.folded.model_size() == size
    assert "RefAdapter" not in loaded
    assert not any(isinstance(value, torch.Tensor) for value in vars(patch).values())
    management.unload_all_models()
    assert not loaded_models()
    assert patch.folded.loaded_size() == 0
    alive = weakref.ref(patch.folded.model)
    del model, patch, loaded
    gc.collect()
    assert alive() is None


def test_a_partial_load_samples_the_same(apply, sample, pytestconfig):
    if pytestconfig.getoption("--dynamic-vram"):
        pytest.skip("the host pages in what a layer needs; there is no partial load")
    model = apply()
    whole = sample(model)
    patcher = patch_of(model).folded
    patcher.unpatch_model(patcher.offload_device)
    patcher.patch_model(patcher.load_device, lowvram_model_memory=1)
    assert patcher.loaded_size() == 0
    assert torch.equal(sample(model), whole)


def test_a_sampling_leaves_no_trace_on_the_patch(apply, sample):
    model = apply()
    patch = patch_of(model)
    before = vars(patch).copy()
    sample(model)
    assert vars(patch) == before


def test_a_sampling_leaves_no_trace_on_the_conditioning(apply, sample, conditioned):
    """What travels with the rows is in copies that the sampling makes."""
    before = [sorted(values) for part in conditioned[:2] for _, values in part]
    sample(apply())
    assert [sorted(values) for part in conditioned[:2] for _, values in part] == before
    assert not any("model_conds" in keys for keys in before)


@pytest.mark.parametrize("picture_size, said", [(32, 1), (64, 0), (None, 0)])
def test_a_picture_too_large_for_the_model_is_said_before_the_first_step(
    models, apply, sample, caplog, picture_size, said
):
    """The pictures here have 64x64 pixels."""
    caplog.set_level("INFO")
    knowledge = Knowledge(picture_size=picture_size)
    model = apply(cat_model=dataclasses.replace(models.cat_model, knowledge=knowledge))
    alike = sample(apply())
    caplog.clear()
    assert torch.equal(sample(model), alike)
    sentence = "64x64 is too large for this model of 32x32 pixels: put CAT Crop Around Mask before"
    assert sum(sentence in line for line in caplog.messages) == said
