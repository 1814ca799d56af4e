"""The adapter beside what the host brings; the table of it all is printed when its rows are done.

Each row is sampled with the adapter after the row's patch and before it, with the adapter unfolded,
with strength 0 in both places, and with only one of the two.
"""

import dataclasses

import pytest
import torch
from composition_rows import TABLE, controlled

pytestmark = pytest.mark.slow

SEEN = 1e-3  # of the largest value: what an effect is at least
COLUMNS = ("unfolded", "order", "strength 0", "adapter", "row")
ROWS = [pytest.param(kind, row, id=row.name) for kind in TABLE for row in TABLE[kind]]


@pytest.fixture(scope="module")
def table(pytestconfig):
    """Lines by kind, printed at the end whatever is captured."""
    lines = []
    yield lines
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{'':13}{'':34}" + "".join(f"{column:>11}" for column in COLUMNS))
        print("\n".join(lines))


def told_apart(conditioning, count):
    """A text for each latent, so that the oracle knows which is which."""
    many = []
    for text, values in conditioning:
        many.append([torch.cat([text * (1 + 0.01 * i) for i in range(count)]), values])
    return many


@pytest.fixture(scope="module")
def alone():
    """What the adapter samples without a row's patch and prompt, by the rest of the row."""
    return {}


@pytest.fixture
def sampled(models, apply, oracle, run, prompts, stack, conditioned, control_net, picture):
    """Sample a row; with strength None without the adapter."""

    def sampled(row, strength=1.0, unfolded=False, first=False):
        positive = prompts["positive"]
        if row.prompt is controlled:
            row = dataclasses.replace(row, prompt=controlled(control_net, picture[0]))
        if row.prompt:
            positive = row.prompt(positive)
        latent = row.latent(conditioned[2]) if row.latent else conditioned[2]
        if len(row.factors) > 1:
            positive = told_apart(positive, len(latent["samples"]))
        named = {**prompts, "positive": positive}
        visual_prompt = stack(*row.factors)

        def adapted(model):
            if strength is None:
                return model
            if unfolded:
                looking = [named[name] for name in row.looking]
                return oracle(*looking, visual_prompt=visual_prompt, model=model)
            return apply(model, visual_prompt=visual_prompt, strength=strength)

        model = models.model
        if first:
            model = adapted(model)
        if row.patch:
            model = row.patch(model)
        if not first:
            model = adapted(model)
        torch.manual_seed(2)  # HyperTile draws its tiles from what the host leaves
        guider = row.guide(model, named)
        return run(guider, row.steps, latent, sampler=row.sampler, scheduler=row.scheduler)

    return sampled


def off(found, expected) -> float:
    """The largest difference, as a share of the largest value."""
    assert found.shape == expected.shape
    assert found.isfinite().all()
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("kind, row", ROWS)
def test_the_adapter_goes_with(kind, row, sampled, alone, table):
    with_both = sampled(row)
    row_alone = sampled(row, strength=None)
    figures = {"unfolded": off(with_both, sampled(row, unfolded=True))}
    figures["strength 0"] = off(sampled(row, strength=0.0), row_alone)
    figures["adapter"] = off(with_both, row_alone)
    if row.patch:
        figures["order"] = off(sampled(row, first=True), with_both)
        none_first = sampled(row, strength=0.0, first=True)
        figures["strength 0"] = max(figures["strength 0"], off(none_first, row_alone))
    if row.patch or row.prompt:
        bare = dataclasses.replace(row, name="", patch=None, prompt=None)
        if bare not in alone:
            alone[bare] = sampled(bare)
        figures["row"] = off(with_both, alone[bare])
    cells = [f"{figures[name]:.1e}" if name in figures else "-" for name in COLUMNS]
    table.append(f"{kind:13}{row.name:34}" + "".join(f"{cell:>11}" for cell in cells))
    assert figures["unfolded"] <= row.equal
    assert figures["strength 0"] == 0
    assert figures["adapter"] > SEEN
    if row.patch and row.commutes:
        assert figures["order"] == 0
    if row.patch or row.prompt:
        assert (figures["row"] > SEEN) == row.seen
