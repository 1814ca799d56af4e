"""tools/bench.py on tiny weights: it runs, measures every form, and says on what.

Times are never judged.
"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from paths import ROOT

from benchmark.adapter_forms import KeptKeysPatch, SkippingPatch
from benchmark.bench_models import CFG, Bench
from benchmark.loading_section import PACK, SAME
from benchmark.steps_in_turn import SamplingsInTurn
from cat_diffusion.nodes.host import sampling

pytestmark = [pytest.mark.once, pytest.mark.slow]

pytest.importorskip("accelerate")

SECTIONS = ["operations", "step", "adapter", "image", "sem-inpainter", "growth", "kernels"]
SECTIONS += ["profile", "loading", "training"]
BEGIN = "<!-- tools/bench.py writes from here -->"
END = "<!-- to here -->"


def run_tool(*words):
    command = [sys.executable, ROOT / "tools" / words[0], *words[1:]]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ)


@pytest.fixture(scope="module")
def measured(tiny_file, tmp_path_factory):
    """What the tool prints, its JSON and its page."""
    folder = tmp_path_factory.mktemp("bench")
    path = folder / "measured.json"
    page = folder / "page.md"
    page.write_text(f"before\n{BEGIN}\na former run\n{END}\nafter\n")
    options = ["--cpu", "--checkpoint", tiny_file, "--size", "64", "--rounds", "2", "--steps", "2"]
    options += ["--sizes", "72", "--batches", "2", "--stacks", "2", "--training-steps", "1"]
    options += ["--shards", "20"]
    options += ["--json", path, "--page", page]
    run = run_tool("bench.py", *options, "--sections", *SECTIONS)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    return SimpleNamespace(
        printed=run.stdout, content=json.loads(path.read_text()), page=page.read_text()
    )


def rows(measured, section):
    return {row["what"]: row for row in measured.content["sections"][section]}


def test_the_table_says_what_the_numbers_were_measured_on(measured):
    assert "device: CPU only" in measured.printed
    assert "processor: " in measured.printed
    assert "software: ComfyUI " in measured.printed
    assert "attention: attention_" in measured.printed
    assert "load average at the end" in measured.printed
    assert measured.content["machine"]["processor"].endswith("threads used")
    assert measured.content["settings"]["size"] == 64


def test_every_form_is_timed_in_every_round_and_compared_with_the_same_round(measured):
    step = rows(measured, "step")
    plain, official, shipped = (step[name] for name in step if not name.startswith("weights"))
    for form in (official, shipped):
        assert len(form["values"]) == 2
        assert min(form["values"]) > 0
        for value, reference, ratio in zip(
            form["values"], plain["values"], form["ratios"], strict=True
        ):
            assert ratio == value / reference
    assert plain["ratios"] == []


def test_multiplications_are_those_of_the_formulas(measured, models):
    """Of each adapter with C columns, heads * M = 256 keys and N latents.

    Folded 2 N C 256, kept 2 N C (C + M); in the official form 2 N C (C + M) and 2 M D C for keys
    and values, for both kinds of rows.
    """
    operations = rows(measured, "operations").values()
    plain, official, shipped, once, folding = (row["values"][0] * 1e9 for row in operations)
    latents = {
        "input_blocks.1": 64,
        "input_blocks.3": 16,
        "middle_block": 16,
        "output_blocks.0": 16,
        "output_blocks.1": 16,
        "output_blocks.2": 64,
        "output_blocks.3": 64,
    }
    config = models.cat_model.architecture.ref_adapter
    expected_official = 0
    expected_shipped = 0
    for name, width in config.blocks:
        n = latents[name.split(".1.transformer")[0]]
        queries_and_attention = 2 * n * width * (width + 64)
        keys_and_values = 2 * 64 * config.visual_size * width
        expected_official += 2 * (queries_and_attention + keys_and_values)
        expected_shipped += 2 * n * width * min(width + 64, 256)
    assert official - plain == pytest.approx(expected_official, rel=1e-6)
    assert shipped - plain == pytest.approx(expected_shipped, rel=1e-6)
    assert once > 0
    assert folding > 0


def test_a_composed_picture_says_so(measured):
    composed = 0
    for name, row in rows(measured, "image").items():
        if name.startswith("50 steps"):
            composed += 1
            assert "composed: sampling of 2 steps times 25" in row["note"]
        elif name.startswith("2 steps"):
            assert "composed" not in row["note"]
    assert composed == 2


def test_pictures_drawn_in_turn_are_those_of_the_host_s_sampler_and_all_forms_agree(tiny_file):
    bench = Bench(tiny_file, 64, 1, cpu=True)
    forms = {
        "plain": bench.model,
        "shipped": bench.apply(),
        "official": bench.official(),
        "once": bench.official(KeptKeysPatch),
        "skipped": bench.official(SkippingPatch),
    }
    samplings = SamplingsInTurn(bench, forms, 64, steps=3)
    samplings.draw()
    latents = samplings.latents
    for name, model in forms.items():
        alone = sampling.ksample(model, 0, 3, CFG, *bench.conditioned(64))
        assert torch.equal(latents[name], alone["samples"])
        assert len(samplings.seconds[name]) == 3
    difference = (latents["plain"] - latents["official"]).abs().max()
    for name in ("shipped", "once", "skipped"):
        assert (latents[name] - latents["official"]).abs().max() <= 1e-4 * difference


def test_the_tables_go_between_the_marks_of_a_page(measured):
    page = measured.page
    assert page.startswith(f"before\n{BEGIN}\n")
    assert page.endswith(f"\n{END}\nafter\n")
    assert "a former run" not in page
    assert "- device: CPU only" in page
    assert page.count("|---|---|---|---|---|") == len(measured.content["sections"])


def test_the_adapters_are_a_part_of_the_loading(measured):
    seconds = {}
    for row in measured.content["sections"]["loading"]:
        if row["unit"] == "s":
            seconds[row["what"]] = row["values"]
    for everything, without in zip(seconds[PACK], seconds[SAME], strict=True):
        assert 0 < without < everything


def test_stages_are_timed_with_and_without_the_cache(measured):
    timed = rows(measured, "training")
    for stage in ("sem-inpainter", "ref-adapter"):
        assert f"{stage}, with encoding" in timed
        assert f"{stage}, from the cache" in timed
        for form in (f"preparing for {stage}", f"reading the cache of {stage}"):
            assert f"{form}, a sample on one core" in timed
            assert f"{form}, workers: 1" in timed
        (waiting,) = timed[f"{stage}, from the cache: waiting for samples"]["values"]
        assert 0 <= waiting <= 100
    assert "memory after 20 of 20 shards" in timed


def test_a_page_without_marks_is_refused_before_anything_is_measured(tiny_file, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("no marks")
    run = run_tool("bench.py", "--checkpoint", tiny_file, "--page", page)
    assert run.returncode == 2
    assert f"expected the lines {BEGIN}" in run.stderr


def test_a_missing_checkpoint_is_said(tmp_path):
    run = run_tool("bench.py", "--checkpoint", tmp_path / "none.safetensors")
    assert run.returncode == 2
    assert "none.safetensors does not exist" in run.stderr


@pytest.mark.full
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_a_full_checkpoint_never_holds_it_twice(full_file):
    """At most 1.15 times what stays, the pages of the file included."""
    run = run_tool("run.py", "benchmark.load_once", "pack", full_file, "--cpu", "--watch")
    assert run.returncode == 0, run.stderr
    took = json.loads(run.stdout.splitlines()[-1])
    stays = took["stays"]["all"]
    assert stays > 0.85 * full_file.stat().st_size / 1e6
    assert took["peak"]["all"] <= 1.15 * stays, took
