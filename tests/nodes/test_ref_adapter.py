"""RefAdapter inside the host's U-Net, through the host's own sampler."""

import copy
import gc
import weakref

import pytest
import torch

from cat_diffusion.cat_core.models import folded
from cat_diffusion.nodes.host.build import build_unet


@pytest.fixture
def counted(pack, monkeypatch):
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


def patches(model):
    return model.model_options["transformer_options"]["patches"]["middle_patch"]


def trace(model, sample, **kwargs):
    """(latent, [denoised of each call of the U-Net]) of a sampling."""
    calls = []

    def wrapper(apply_model, arguments):
        out = apply_model(arguments["input"], arguments["timestep"], **arguments["c"])
        calls.append((list(arguments["cond_or_uncond"]), out))
        return out

    model = model.clone()
    model.set_model_unet_function_wrapper(wrapper)
    return sample(model, **kwargs), calls


def test_it_changes_the_result_and_seeds_reproduce(models, apply, sample):
    plain, adapted = sample(models.model), sample(apply())
    assert (plain - adapted).abs().max() > 1e-2
    assert torch.equal(adapted, sample(apply()))
    assert not torch.equal(adapted, sample(apply(), seed=2))
    assert adapted.isfinite().all()


def test_strength_0_is_bit_identical_to_the_plain_model(models, apply, sample):
    assert torch.equal(sample(models.model), sample(apply(strength=0.0)))


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
    models, apply, sample, counted, start, end, active
):
    _, plain = trace(models.model, sample, steps=4)
    patched = apply(start=start, end=end)
    _, limited = trace(patched, sample, steps=4)
    assert len(limited) == len(plain) == 4
    before_any = active.index(True)
    for step in range(before_any):  # the inputs are still the same here, so the outputs must be
        assert torch.equal(limited[step][1], plain[step][1])
    assert not torch.equal(limited[before_any][1], plain[before_any][1])
    counted["rows"].clear()
    sample(patched, steps=4)
    assert len(counted["rows"]) == sum(active) * len(
        dict(models.cat_model.architecture.ref_adapter.blocks)
    )


def test_late_steps_outside_the_range_run_the_plain_unet(models, apply):
    """The same input through both models at a noise level past the end."""
    from cat_diffusion.nodes.apply_ref_adapter import RefAdapterPatch

    patch = patches(apply(end=0.5))[0]
    assert isinstance(patch, RefAdapterPatch)
    x = torch.randn(2, 16, 32)
    options = {"block": ("input", 1), "block_index": 0, "cond_or_uncond": [0, 1]}
    assert patch(x, {**options, "sigmas": torch.tensor([0.05])}) is x
    assert not torch.equal(patch(x, {**options, "sigmas": torch.tensor([14.0])}), x)


def test_the_visual_prompt_is_folded_once_for_all_samplings(models, apply, sample, counted):
    model, blocks = apply(), len(models.cat_model.architecture.ref_adapter.blocks)
    sample(model, steps=5)
    sample(model, seed=2, steps=1)
    assert counted["folds"] == blocks
    assert len(counted["rows"]) == 6 * blocks


def test_unconditional_rows_take_the_bias_only(models, apply, sample, counted, prompt):
    model = apply()
    _, calls = trace(model, sample, steps=2)
    assert {tuple(sorted(conds)) for conds, _ in calls} == {(0, 1)}  # both in one call of the U-Net
    assert set(counted["rows"]) == {1}  # yet only the conditional row attends
    x, block = (
        torch.randn(2, 16, 32),
        models.cat_model.ref_adapter.model.block("input_blocks.1.1.transformer_blocks.0"),
    )
    out = patches(model)[0](
        x,
        {
            "block": ("input", 1),
            "block_index": 0,
            "cond_or_uncond": [1, 0],
            "sigmas": torch.ones(1),
        },
    )
    assert torch.equal(out[0], x[0] + block.attn3.to_out[0].bias)
    assert torch.allclose(out[1:], x[1:] + block(x[1:], prompt.tokens), atol=1e-5)


def test_cfg_1_runs_the_conditional_row_alone(models, apply, sample, counted):
    latent, calls = trace(apply(), sample, cfg=1.0)
    assert {tuple(conds) for conds, _ in calls} == {(0,)}
    assert not torch.equal(latent, sample(models.model, cfg=1.0))


def test_low_memory_runs_cond_and_uncond_apart_with_the_same_result(
    models, apply, sample, monkeypatch
):
    together = sample(apply())
    monkeypatch.setattr(models.model.model, "memory_required", lambda *args, **kwargs: 1e20)
    apart, calls = trace(apply(), sample)
    assert {tuple(conds) for conds, _ in calls} == {(0,), (1,)}
    assert torch.allclose(apart, together, atol=1e-4 * together.abs().max())


def test_one_patched_model_in_two_samplers_and_again(apply, sample):
    model = apply()
    first, other = sample(model), sample(model, sampler="euler", scheduler="normal", steps=2)
    assert torch.equal(first, sample(model))
    assert torch.equal(other, sample(model.clone(), sampler="euler", scheduler="normal", steps=2))


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m", "heun", "uni_pc", "lcm"])
def test_other_samplers(apply, sample, sampler):
    assert sample(apply(), sampler=sampler, scheduler="karras", steps=3).isfinite().all()


def test_several_adapters_on_one_model(apply, sample, stack):
    one, two = apply(), apply(apply(), visual_prompt=stack(-3.0))
    assert len(patches(two)) == 2 and len(patches(one)) == 1
    assert not torch.equal(sample(one), sample(two))
    assert torch.equal(sample(one), sample(apply(apply(), strength=0.0)))


def test_changing_the_strength_loads_none_of_the_models_again(models, apply, sample, monkeypatch):
    sample(apply())
    loads = []
    for patcher in (models.model, models.cat_model.ref_adapter, models.cat_model.sem_inpainter):
        load = patcher.load
        monkeypatch.setattr(
            patcher,
            "load",
            lambda *args, load=load, **kwargs: loads.append(1) or load(*args, **kwargs),
        )
    results = [sample(apply(strength=strength)) for strength in (0.5, 1.0, -1.0)]
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])
    assert not loads


def test_a_batch_of_prompts_equals_single_runs(apply, stack, conditioned):
    """N prompts go with N latents row by row; fewer prompts repeat; one serves all."""
    x = torch.randn(8, 16, 32)
    options = {
        "block": ("input", 1),
        "block_index": 0,
        "cond_or_uncond": [1, 0],
        "sigmas": torch.ones(1),
    }
    single = [patches(apply(visual_prompt=stack(factor)))[0] for factor in (1.0, -2.0)]
    many = patches(apply(visual_prompt=stack(1.0, -2.0)))[0](x, options)
    for row in range(4):
        one = single[row % 2](torch.stack((x[row], x[4 + row])), options)
        assert torch.allclose(many[[row, 4 + row]], one, atol=1e-5)
    assert torch.allclose(single[0](x, options)[4:5], single[0](x[[0, 4]], options)[1:], atol=1e-5)


@pytest.mark.parametrize("prompts, latents", [(1, 3), (3, 3), (2, 4), (3, 1)])
def test_batches_of_latents(apply, sample, stack, conditioned, prompts, latents):
    latent = {"samples": conditioned[2]["samples"].repeat(latents, 1, 1, 1)}
    out = sample(apply(visual_prompt=stack(*range(1, prompts + 1))), latent=latent)
    assert len(out) == latents and out.isfinite().all()


def test_area_conditioning_crops_the_latent_and_still_works(apply, sample, conditioned):
    area = [
        [c, {**d, "area": (4, 4, 2, 2), "strength": 1.0, "set_area_to_bounds": False}]
        for c, d in conditioned[0]
    ]
    assert sample(apply(), positive=conditioned[0] + area).isfinite().all()


def test_clones_and_deep_copies_share_the_patch(apply):
    model = apply()
    assert patches(model.clone())[0] is patches(model)[0]
    assert copy.deepcopy(patches(model)[0]) is patches(model)[0]
    assert patches(model)[0].to("cpu") is patches(model)[0].to(torch.float16) is patches(model)[0]


def test_the_original_model_is_left_alone(models, apply):
    apply()
    assert "middle_patch" not in models.model.model_options["transformer_options"].get(
        "patches", {}
    )


def test_it_works_next_to_other_patches(models, apply, sample):
    model = models.model.clone()
    model.set_model_attn2_output_patch(lambda x, options: x * 0.5)
    model.set_model_sampler_post_cfg_function(lambda arguments: arguments["denoised"] * 0.9)
    alone, both = sample(model), sample(apply(model))
    assert both.isfinite().all() and not torch.equal(alone, both)
    assert torch.equal(alone, sample(apply(model, strength=0.0)))


def test_the_folded_matrices_load_with_the_model_and_the_adapter_itself_does_not(models, apply):
    found = apply().model_patches_models()
    assert [type(patcher.model).__name__ for patcher in found] == ["FoldedRefAdapter"]
    shared = {id(parameter) for parameter in models.cat_model.ref_adapter.model.parameters()}
    assert not shared & {id(parameter) for parameter in found[0].model.parameters()}


def test_the_host_counts_them_to_the_byte_and_nothing_stays_after_unloading(apply, sample):
    """Whatever the patch holds is in the one model that it names; with that unloaded and dropped, nothing is left."""
    import comfy.model_management as management

    management.unload_all_models()  # other tests' models
    model = apply()
    sample(model)
    patch = patches(model)[0]
    size = sum(
        parameter.numel() * parameter.element_size()
        for parameter in patch.folded.model.parameters()
    )
    loaded = {type(entry.model.model).__name__: entry for entry in management.current_loaded_models}
    assert loaded["FoldedRefAdapter"].model is patch.folded
    assert loaded["FoldedRefAdapter"].model_loaded_memory() == patch.folded.model_size() == size
    assert "RefAdapter" not in loaded
    assert not any(isinstance(value, torch.Tensor) for value in vars(patch).values())
    management.unload_all_models()
    assert not management.current_loaded_models and patch.folded.loaded_size() == 0
    alive = weakref.ref(patch.folded.model)
    del model, patch, loaded
    gc.collect()
    assert alive() is None


def test_a_partial_load_samples_the_same(apply, sample, pytestconfig):
    if pytestconfig.getoption("--dynamic-vram"):
        pytest.skip("the host pages in what a layer needs; there is no partial load")
    model = apply()
    whole = sample(model)
    patcher = patches(model)[0].folded
    patcher.unpatch_model(patcher.offload_device)
    patcher.patch_model(patcher.load_device, lowvram_model_memory=1)
    assert patcher.loaded_size() == 0
    assert torch.equal(sample(model), whole)


def test_half_precision_hidden_states_keep_their_type(apply):
    patch = patches(apply())[0]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.randn(2, 16, 32, dtype=dtype)
        out = patch(
            x,
            {
                "block": ("input", 1),
                "block_index": 0,
                "cond_or_uncond": [0, 1],
                "sigmas": torch.ones(1),
            },
        )
        assert out.dtype == dtype and out.isfinite().all()


def test_a_sampling_leaves_no_trace_on_the_patch(apply, sample):
    from comfyui_version import __version__

    model = apply()
    before = dict(vars(patches(model)[0]), _negatives=set())
    sample(model)
    if tuple(map(int, __version__.split(".")[:2])) < (
        0,
        30,
    ):  # older hosts do not call a patch's cleanup
        patches(model)[0].cleanup()
    assert vars(patches(model)[0]) == before


def test_wrappers_of_the_host_see_the_patched_model(apply, sample):
    """Other packs wrap APPLY_MODEL; the patch must not depend on being called directly."""
    from comfy.patcher_extension import WrappersMP

    seen = []

    def wrapper(executor, *args, **kwargs):
        seen.append(1)
        return executor(*args, **kwargs)

    plain = sample(apply())
    model = apply()
    model.add_wrapper(WrappersMP.APPLY_MODEL, wrapper)
    assert torch.equal(sample(model), plain) and seen


def test_a_compiled_model_gives_the_same_and_follows_a_new_strength(apply, sample):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    for strength in (1.0, -0.5):
        model = apply(strength=strength)
        plain = sample(model, steps=2)
        set_torch_compile_wrapper(model, backend="eager")
        assert torch.allclose(sample(model, steps=2), plain, atol=1e-4 * plain.abs().max())


def test_rows_of_several_positive_chunks_keep_their_prompts(apply, stack):
    """Combined or area conditioning at cfg 1 puts several positive chunks under each other."""
    patch = patches(apply(visual_prompt=stack(1.0, -2.0)))[0]
    x = torch.randn(2, 16, 32)
    options = {"block": ("input", 1), "block_index": 0, "sigmas": torch.ones(1)}
    for latents in (x[:1], x, x.repeat(2, 1, 1)):
        single = patch(latents, {**options, "cond_or_uncond": [0]})
        double = patch(torch.cat((latents, latents)), {**options, "cond_or_uncond": [0, 0]})
        triple = patch(torch.cat((latents,) * 3), {**options, "cond_or_uncond": [0, 1, 0]})
        count = len(latents)
        assert torch.allclose(double[:count], single, atol=1e-5) and torch.allclose(
            double[count:], single, atol=1e-5
        )
        assert torch.allclose(triple[:count], single, atol=1e-5) and torch.allclose(
            triple[2 * count :], single, atol=1e-5
        )


def test_self_attention_guidance_keeps_its_unconditional_pass_unconditional(apply, sample, counted):
    """The stock node runs the negative prompt alone, which looks like a positive one."""
    from comfy_extras.nodes_sag import SelfAttentionGuidance

    guided = SelfAttentionGuidance.execute(apply(), 0.5, 2.0).args[0]
    latent, calls = trace(guided, sample, steps=3)
    assert any(conds == [0] for conds, _ in calls) and latent.isfinite().all()
    assert len(counted["rows"]) == sum(len(conds) == 2 for conds, _ in calls) * 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_unet_samples_nearly_the_same(models, apply, sample, monkeypatch, dtype):
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "unet_dtype", lambda **kwargs: dtype)
    monkeypatch.setattr(comfy.model_management, "unet_manual_cast", lambda *args, **kwargs: None)
    half = build_unet(models.file)
    assert half.model.get_dtype() == dtype
    assert {parameter.dtype for parameter in patches(apply(half))[0].folded.model.parameters()} == {
        dtype
    }
    whole, approximate = sample(apply()), sample(apply(half))
    assert approximate.isfinite().all()
    assert (whole - approximate).abs().mean() < 0.1 * whole.abs().mean()
