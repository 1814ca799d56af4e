"""Which rows look at the visual prompt, under each stock guider and whatever comes between."""

import comfy.samplers
import pytest
import torch
from comfy_extras import nodes_custom_sampler as stock
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_perpneg import PerpNeg
from comfy_extras.nodes_sag import SelfAttentionGuidance
from stock_guiders import CFG, basic, cfg, dual, perpendicular

from cat_diffusion.nodes.host import symbols
from nodes import ConditioningSetMask, ConditioningSetTimestepRange, ControlNetApplyAdvanced

SLOW = pytest.mark.slow


def assert_equal(found, expected, error=2e-5):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= error * expected.abs().max()


@pytest.fixture
def assert_same_guidance(models, apply, run):
    """Two guiders that are one thing are so without the adapter and with it, and it has effect."""

    def assert_same_guidance(one, other):
        plain = run(one(models.model))
        assert_equal(plain, run(other(models.model)))
        adapted = run(one(apply()))
        assert_equal(adapted, run(other(apply())))
        assert (adapted - plain).abs().max() > 1e-2 * plain.abs().max()

    return assert_same_guidance


# Guiders that are one thing --------------------------------------------------------------------


def test_ksampler_is_the_cfg_guider(models, apply, run, sample, prompts):
    def ksampler(model):
        return sample(
            model,
            steps=1,
            cfg=CFG,
            sampler="euler",
            scheduler="normal",
            positive=prompts["positive"],
            negative=prompts["negative"],
        )

    for model in (models.model, apply()):
        guided = run(cfg(model, prompts["positive"], prompts["negative"]))
        assert torch.equal(ksampler(model), guided)


def test_a_basic_guider_is_cfg_of_scale_1(assert_same_guidance, prompts):
    assert_same_guidance(
        lambda model: basic(model, prompts["positive"]),
        lambda model: cfg(model, prompts["positive"], prompts["negative"], 1.0),
    )


@pytest.mark.parametrize("style", ["regular", "nested"])
def test_dual_cfg_of_twice_the_positive_prompt_is_cfg(assert_same_guidance, prompts, style):
    positive = prompts["positive"]
    negative = prompts["negative"]
    assert_same_guidance(
        lambda model: dual(model, positive, positive, negative, style=style),
        lambda model: cfg(model, positive, negative),
    )


@pytest.mark.parametrize("style, scales", [("regular", (CFG, 3.0)), ("nested", (CFG, 1.0))])
def test_dual_cfg_of_twice_the_negative_prompt_is_cfg(assert_same_guidance, prompts, style, scales):
    positive = prompts["positive"]
    negative = prompts["negative"]
    assert_same_guidance(
        lambda model: dual(model, positive, negative, negative, scales=scales, style=style),
        lambda model: cfg(model, positive, negative),
    )


@pytest.mark.skipif(not hasattr(stock, "DualModelGuider"), reason="this host has none")
def test_dual_model_with_one_model_twice_is_cfg(assert_same_guidance, models, prompts):
    positive = prompts["positive"]
    negative = prompts["negative"]

    def dual_model(model):
        (guider,) = stock.DualModelGuider.execute(model, positive, CFG, model, negative).args
        return guider

    def plain_negative(model):
        (guider,) = stock.DualModelGuider.execute(model, positive, CFG, models.model, negative).args
        return guider

    assert_same_guidance(dual_model, lambda model: cfg(model, positive, negative))
    # The host runs the negative prompt with the patches of the first model in any case.
    assert_same_guidance(plain_negative, lambda model: cfg(model, positive, negative))


def test_perp_neg_of_scale_0_is_cfg(assert_same_guidance, prompts):
    positive = prompts["positive"]
    empty = prompts["empty"]
    assert_same_guidance(
        lambda model: perpendicular(model, positive, prompts["negative"], empty, 0.0),
        lambda model: cfg(model, positive, empty),
    )


def test_the_older_perp_neg_node_is_the_guider(assert_same_guidance, prompts):
    positive = prompts["positive"]
    negative = prompts["negative"]
    empty = prompts["empty"]

    def older(model):
        return cfg(PerpNeg.execute(model, empty, 1.0).args[0], positive, negative)

    assert_same_guidance(older, lambda model: perpendicular(model, positive, negative, empty))


@pytest.mark.parametrize("order", ["adapter first", "adapter last"])
@pytest.mark.parametrize(
    "node, strength", [(SelfAttentionGuidance, (0.0, 2.0)), (PerturbedAttentionGuidance, (0.0,))]
)
def test_guidance_of_strength_0_is_none(models, apply, run, prompts, node, strength, order):
    if order == "adapter first":
        (model,) = node.execute(apply(), *strength).args
    else:
        model = apply(node.execute(models.model, *strength).args[0])
    guided = run(cfg(model, prompts["positive"], prompts["negative"]))
    assert_equal(guided, run(cfg(apply(), prompts["positive"], prompts["negative"])))


# Rows told apart by what they read -------------------------------------------------------------


@pytest.mark.parametrize("style", ["regular", "nested"])
def test_both_conditions_of_dual_cfg_look(apply, oracle, run, prompts, style):
    conditions = [prompts[name] for name in ("positive", "other", "negative")]
    expected = run(dual(oracle(*conditions[:2]), *conditions, style=style))
    assert_equal(run(dual(apply(), *conditions, style=style)), expected)


def test_only_the_positive_prompt_of_perp_neg_looks(apply, oracle, run, prompts):
    conditions = [prompts[name] for name in ("positive", "negative", "empty")]
    expected = run(perpendicular(oracle(prompts["positive"]), *conditions))
    assert_equal(run(perpendicular(apply(), *conditions)), expected)


@pytest.mark.parametrize(
    "node, strength", [(SelfAttentionGuidance, (0.5, 2.0)), (PerturbedAttentionGuidance, (3.0,))]
)
def test_guidance_runs_each_prompt_as_what_it_is(apply, oracle, run, prompts, node, strength):
    """SAG runs the negative prompt alone, PAG the positive, each as the only one of its call."""
    positive = prompts["positive"]
    negative = prompts["negative"]
    guided = run(cfg(node.execute(apply(), *strength).args[0], positive, negative))
    expected = node.execute(oracle(positive), *strength).args[0]
    assert_equal(guided, run(cfg(expected, positive, negative)))
    unguided = run(cfg(apply(), positive, negative))
    assert (guided - unguided).abs().max() > 1e-3


def in_area(conditioning):
    """For a corner, which the host crops."""
    corner = {"area": (4, 4, 2, 2), "strength": 1.0, "set_area_to_bounds": False}
    return symbols.with_values(conditioning, corner)


def masked(conditioning):
    """For a corner, by a mask that the host crops to."""
    mask = torch.zeros(1, 64, 64)
    mask[:, :32, :32] = 1
    return ConditioningSetMask().append(conditioning, mask, "mask bounds", 1.0)[0]


def early(conditioning):
    return ConditioningSetTimestepRange().set_range(conditioning, 0.0, 0.6)[0]


def late(conditioning):
    return ConditioningSetTimestepRange().set_range(conditioning, 0.4, 1.0)[0]


def whole(conditioning):
    return conditioning


COMPOSITIONS = {
    "two prompts": ([whole, whole], [whole]),
    "an area": ([whole, in_area], [whole]),
    "an area alone": ([in_area], [whole]),
    "a negative area": ([whole], [whole, in_area]),
    "areas of both": ([whole, in_area], [whole, in_area]),
    "a mask": ([whole, masked], [whole]),
    "one after the other": ([early, late], [whole]),
    "negative one after the other": ([whole], [early, late]),
}
QUICK = ("an area", "a mask", "one after the other")


@pytest.mark.parametrize(
    "composition",
    [name if name in QUICK else pytest.param(name, marks=SLOW) for name in COMPOSITIONS],
)
def test_composed_conditionings(apply, oracle, run, prompts, composition):
    """Each part is of a text of its own, so that rows are told apart by what they read."""
    of_positive, of_negative = COMPOSITIONS[composition]
    positive = []
    for part, name in zip(of_positive, ("positive", "other"), strict=False):
        positive += part(prompts[name])
    negative = []
    for part, name in zip(of_negative, ("negative", "empty"), strict=False):
        negative += part(prompts[name])
    expected = run(cfg(oracle(prompts["positive"], prompts["other"]), positive, negative), steps=3)
    assert_equal(run(cfg(apply(), positive, negative), steps=3), expected)


def test_areas_under_dual_cfg(apply, oracle, run, prompts):
    conditions = [
        [*prompts["positive"], *in_area(prompts["empty"])],
        prompts["other"],
        prompts["negative"],
    ]
    looking = [prompts[name] for name in ("positive", "empty", "other")]
    assert_equal(run(dual(apply(), *conditions)), run(dual(oracle(*looking), *conditions)))


def test_control_nets(apply, oracle, run, prompts, picture, control_net):
    """A ControlNet of one prompt alone keeps the host from batching it with the others."""
    positive = prompts["positive"]
    negative = prompts["negative"]
    node = ControlNetApplyAdvanced()
    controlled, _ = node.apply_controlnet(
        positive, negative, control_net, picture[0], 1.0, 0.0, 1.0
    )
    both = [*prompts["other"], *controlled]
    plain = run(cfg(oracle(positive, prompts["other"]), [*prompts["other"], *positive], negative))
    expected = run(cfg(oracle(positive, prompts["other"]), both, negative))
    assert (plain - expected).abs().max() > 1e-3
    assert_equal(run(cfg(apply(), both, negative)), expected)


def test_low_memory_runs_every_condition_alone(models, apply, oracle, run, prompts, monkeypatch):
    conditions = [prompts[name] for name in ("positive", "other", "negative")]
    together = run(dual(apply(), *conditions))
    monkeypatch.setattr(models.model.model, "memory_required", lambda *args, **kwargs: 1e20)
    assert_equal(run(dual(apply(), *conditions)), together)
    assert_equal(run(dual(oracle(*conditions[:2]), *conditions)), together)


class ThirdPromptGuider(comfy.samplers.CFGGuider):
    """CFG away from the negative prompt to the mean of two others."""

    def set_prompts(self, positive, negative, **more):
        self.inner_set_conds({"positive": positive, "negative": negative, **more})
        return self

    def predict_noise(self, x, timestep, model_options=None, seed=None):
        names = [name for name in self.conds if name != "negative"]
        conditions = [self.conds[name] for name in ("negative", *names)]
        negative, *others = comfy.samplers.calc_cond_batch(
            self.inner_model, conditions, x, timestep, model_options
        )
        return negative + 3 * (sum(others) / len(others) - negative)


@pytest.mark.parametrize("name, looks", [("style", True), ("uncond_style", False)])
def test_a_prompt_that_other_guiders_name(apply, oracle, run, prompts, caplog, name, looks):
    """What is neither positive nor negative by its name looks, and is said once a sampling."""
    caplog.set_level("INFO")
    conditions = {"positive": prompts["positive"], "negative": prompts["negative"]}
    conditions[name] = prompts["other"]
    looking = [prompts["positive"]] + [prompts["other"]] * looks
    expected = run(ThirdPromptGuider(oracle(*looking)).set_prompts(**conditions), steps=2)
    caplog.clear()
    assert_equal(run(ThirdPromptGuider(apply()).set_prompts(**conditions), steps=2), expected)
    sentence = "calls a prompt 'style', which says neither positive nor negative: it looks"
    assert len([line for line in caplog.messages if sentence in line]) == looks


# Which latent ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def four_latents(conditioned):
    return {"samples": conditioned[2]["samples"].repeat(4, 1, 1, 1)}


@pytest.fixture
def four_prompts(stack):
    return stack(1.0, -2.0, 3.0, -4.0)


def windowed(model, **changes):
    settings = {
        "context_length": 2,
        "context_overlap": 0,
        "context_schedule": "standard_static",
        "context_stride": 1,
        "closed_loop": False,
        "fuse_method": "flat",
        "dim": 0,
        "freenoise": False,
    }
    return ContextWindowsManualNode.execute(model, **{**settings, **changes}).args[0]


@pytest.fixture
def assert_windows_change_nothing(apply, run, prompts, four_latents, four_prompts):
    """Latents of SD 1.5 know nothing of each other, and each keeps its own visual prompt."""

    def guided(model):
        return run(cfg(model, prompts["positive"], prompts["negative"]), latent=four_latents)

    def assert_windows_change_nothing(model):
        expected = guided(apply(visual_prompt=four_prompts))
        assert_equal(guided(model), expected, error=1e-4)
        for row in range(4):
            difference = expected[row] - expected[(row + 1) % 4]
            assert difference.abs().max() > 1e-2 * expected.abs().max()

    return assert_windows_change_nothing


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"context_overlap": 1, "fuse_method": "pyramid"},
        {"context_schedule": "looped_uniform", "context_stride": 2, "closed_loop": True},
        pytest.param({"context_length": 3, "context_schedule": "batched"}, marks=SLOW),
        pytest.param({"context_length": 1}, marks=SLOW),
    ],
    ids=str,
)
def test_context_windows_change_nothing(
    apply, assert_windows_change_nothing, four_prompts, changes
):
    assert_windows_change_nothing(windowed(apply(visual_prompt=four_prompts), **changes))


def test_context_windows_before_the_adapter(
    models, apply, assert_windows_change_nothing, four_prompts
):
    assert_windows_change_nothing(apply(windowed(models.model), visual_prompt=four_prompts))


def test_context_windows_of_fewer_prompts_and_with_dual_cfg(
    apply, run, prompts, four_latents, stack
):
    conditions = [prompts[name] for name in ("positive", "other", "negative")]
    visual_prompt = stack(1.0, -2.0, 3.0)
    whole = run(dual(apply(visual_prompt=visual_prompt), *conditions), latent=four_latents)
    model = windowed(apply(visual_prompt=visual_prompt), context_length=3, context_overlap=1)
    assert_equal(run(dual(model, *conditions), latent=four_latents), whole, error=1e-4)


# Tiles under each other ------------------------------------------------------------------------


def tiled(model, repeats, at_once=2):
    """A model whose U-Net sees the left and the right half of a latent, `at_once` in a call.

    Tiles of a call come under each other, each with all its prompts, as in packs that sample large
    pictures in tiles.

    Args:
        repeats: whether a tensor by that name goes with the rows; None leaves it out.
    """

    def wrapper(apply_model, arguments):
        x = arguments["input"]
        width = x.shape[3] // 2
        out = torch.empty_like(x)
        for first in range(0, 2, at_once):
            tiles = [slice(width * i, width * (i + 1)) for i in range(first, first + at_once)]
            conditions = {}
            for name, value in arguments["c"].items():
                if torch.is_tensor(value):
                    if repeats(name) is None:
                        continue
                    if value.ndim == 4:
                        value = torch.cat([value[..., tile] for tile in tiles])
                    elif repeats(name):
                        value = torch.cat([value] * at_once)
                conditions[name] = value
            rows = torch.cat([x[..., tile] for tile in tiles])
            timesteps = torch.cat([arguments["timestep"]] * at_once)
            results = apply_model(rows, timesteps, **conditions).chunk(at_once)
            for tile, result in zip(tiles, results, strict=True):
                out[..., tile] = result
        return out

    patched = model.clone()
    patched.set_model_unet_function_wrapper(wrapper)
    return patched


OURS = "cat_diffusion_rows"
SENTENCES = ("Another node runs 8 rows", "Another node keeps from the U-Net")


@pytest.fixture
def tiles(apply, run, prompts, conditioned, stack, caplog):
    """Sample two latents with two prompts in tiles: (latent, how often each sentence was said)."""
    caplog.set_level("INFO")
    latent = {"samples": conditioned[2]["samples"].repeat(2, 1, 1, 1)}

    def tiles(repeats, at_once):
        model = tiled(apply(visual_prompt=stack(1.0, -2.0)), repeats, at_once)
        caplog.clear()
        out = run(cfg(model, prompts["positive"], prompts["negative"]), latent=latent, steps=2)
        return out, [sum(words in line for line in caplog.messages) for words in SENTENCES]

    return tiles


def test_tiles_under_each_other_take_their_numbers_with_them(tiles):
    apart, _ = tiles(lambda name: True, at_once=1)
    together, said = tiles(lambda name: True, at_once=2)
    assert_equal(together, apart)
    assert said == [0, 0]


def test_rows_that_nobody_numbered_are_said_once_and_repeat(tiles):
    apart, _ = tiles(lambda name: True, at_once=1)
    together, said = tiles(lambda name: name != OURS, at_once=2)
    assert_equal(together, apart)
    assert said == [1, 0]


def test_a_node_that_drops_the_numbers_leaves_the_ids(tiles):
    apart, _ = tiles(lambda name: True, at_once=1)
    dropped, said = tiles(lambda name: None if name == OURS else True, at_once=1)
    assert_equal(dropped, apart)
    assert said == [0, 1]
