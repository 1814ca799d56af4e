"""tools/bench.py on tiny weights: it runs, measures every form, and says on what. Times are never judged."""

import json
import os
import subprocess
import sys

import pytest
import torch
from paths import ROOT

pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def measured(tiny_file, tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "measured.json"
    (path.parent / "page.md").write_text(
        "before\n<!-- tools/bench.py writes from here -->\na former run\n<!-- to here -->\nafter\n"
    )
    command = [
        sys.executable,
        ROOT / "tools/bench.py",
        "--cpu",
        "--checkpoint",
        tiny_file,
        "--size",
        "64",
        "--rounds",
        "2",
        "--steps",
        "2",
        "--sizes",
        "72",
        "--batches",
        "2",
        "--stacks",
        "2",
        "--training-steps",
        "1",
        "--json",
        path,
        "--page",
        path.parent / "page.md",
        "--sections",
        "operations",
        "step",
        "adapter",
        "image",
        "sem-inpainter",
        "growth",
        "kernels",
        "profile",
        "loading",
        "training",
    ]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    return run.stdout, json.loads(path.read_text()), (path.parent / "page.md").read_text()


def rows(measured, section):
    return {row["what"]: row for row in measured[1]["sections"][section]}


def test_the_table_says_what_the_numbers_were_measured_on(measured):
    printed, found, _ = measured
    for text in (
        "device: CPU only",
        "processor: ",
        "software: ComfyUI ",
        "attention: attention_",
        "load average at the end",
    ):
        assert text in printed
    assert (
        found["machine"]["processor"].endswith("threads used") and found["settings"]["size"] == 64
    )


def test_every_form_is_timed_in_every_round_and_compared_with_the_reference_of_the_same_round(
    measured,
):
    step = rows(measured, "step")
    plain, official, shipped = (step[name] for name in step if not name.startswith("weights"))
    for form in (official, shipped):
        assert len(form["values"]) == 2 and min(form["values"]) > 0
        assert form["ratios"] == [a / b for a, b in zip(form["values"], plain["values"])]
    assert plain["ratios"] == []


def test_multiplications_are_those_of_the_formulas(measured, models):
    """Of each adapter with C columns, heads * M = 256 keys and N latents: folded 2 N C 256, kept 2 N C (C + M); in the official
    form 2 N C (C + M) and 2 M D C for keys and values, for both kinds of rows."""
    counts = [row["values"][0] * 1e9 for row in measured[1]["sections"]["operations"]]
    plain, official, shipped, once, folding = counts
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
    expected_official = expected_shipped = 0
    for name, width in config.blocks:
        n = latents[name.split(".1.transformer")[0]]
        expected_official += 2 * (
            2 * n * width * (width + 64) + 2 * 64 * config.visual_size * width
        )
        expected_shipped += 2 * n * width * min(width + 64, 256)
    assert official - plain == pytest.approx(expected_official, rel=1e-6)
    assert shipped - plain == pytest.approx(expected_shipped, rel=1e-6)
    assert once > 0 and folding > 0


def test_a_composed_picture_says_so(measured):
    image = rows(measured, "image")
    composed = [row for name, row in image.items() if name.startswith("50 steps")]
    assert len(composed) == 2 and all(
        "composed: sampling of 2 steps times 25" in row["note"] for row in composed
    )
    assert not any(
        "composed" in row["note"] for name, row in image.items() if name.startswith("2 steps")
    )


def test_pictures_drawn_in_turn_are_those_of_the_host_s_sampler_and_all_forms_agree(tiny_file):
    import nodes
    from benchmark import sampling

    with torch.inference_mode():
        bench = sampling.Bench(tiny_file, 64, 1, True)
        forms = {
            "plain": bench.model,
            "shipped": bench.apply(),
            "official": bench.official(),
            "once": bench.official(once=True),
            "skipped": bench.official(once=True, skip=True),
        }
        seconds, latents = bench.draw(forms, 64, 3)
        for name, model in forms.items():
            alone = nodes.common_ksampler(
                model, 0, 3, sampling.CFG, "ddim", "ddim_uniform", *bench.conditioned(64)
            )
            assert torch.equal(latents[name], alone[0]["samples"]) and len(seconds[name]) == 3
    difference = (latents["plain"] - latents["official"]).abs().max()
    for name in ("shipped", "once", "skipped"):
        assert (latents[name] - latents["official"]).abs().max() <= 1e-4 * difference


def test_the_tables_go_between_the_marks_of_a_page(measured):
    page = measured[2]
    assert page.startswith("before\n<!-- tools/bench.py writes from here -->\n") and page.endswith(
        "\n<!-- to here -->\nafter\n"
    )
    assert (
        "a former run" not in page
        and "- device: CPU only" in page
        and page.count("|---|---|---|---|---|") == len(measured[1]["sections"])
    )


def test_stages_are_timed_with_and_without_the_cache(measured):
    assert {
        "sem-inpainter, with encoding",
        "sem-inpainter, from the cache",
        "ref-adapter, with encoding",
        "ref-adapter, from the cache",
    } <= set(rows(measured, "training"))


def test_a_page_without_marks_is_refused_before_anything_is_measured(tiny_file, tmp_path):
    (tmp_path / "page.md").write_text("no marks")
    run = subprocess.run(
        [
            sys.executable,
            ROOT / "tools/bench.py",
            "--checkpoint",
            tiny_file,
            "--page",
            tmp_path / "page.md",
        ],
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert (
        run.returncode == 2
        and "expected the lines <!-- tools/bench.py writes from here -->" in run.stderr
    )


def test_a_missing_checkpoint_is_said(tmp_path):
    run = subprocess.run(
        [sys.executable, ROOT / "tools/bench.py", "--checkpoint", tmp_path / "none.safetensors"],
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert run.returncode == 2 and "none.safetensors does not exist" in run.stderr


@pytest.mark.full
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_a_full_checkpoint_never_holds_it_twice(full_file):
    """At most 1.15 times what stays, the pages of the file included."""
    run = subprocess.run(
        [
            sys.executable,
            ROOT / "tools/run.py",
            "benchmark.loading",
            "pack",
            full_file,
            "--cpu",
            "--watch",
        ],
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["stays"]["all"] > 3000
    assert found["peak"]["all"] <= 1.15 * found["stays"]["all"], found
