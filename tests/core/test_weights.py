"""Weight files: every accepted form, and a readable refusal of everything else."""

import dataclasses
import json
import logging
import os
import pickle
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from paths import ROOT
from safetensors.torch import load_file, save_file

from cat_diffusion.cat_core import weights
from cat_diffusion.cat_core.training.start import unet_lora
from cat_diffusion.cat_core.weights import WeightsError


@pytest.fixture(scope="module")
def official(tiny):
    """The tiny checkpoint as a flat official state dict; heads 64 wide as there is no metadata."""
    return weights.flat(tiny[0]) | {"betas": torch.rand(1000), "alphas_cumprod": torch.rand(1000)}


def assert_same_parts(found, expected):
    assert found.keys() == expected.keys()
    for part in expected:
        assert found[part].keys() == expected[part].keys()
        for key, tensor in expected[part].items():
            assert torch.equal(found[part][key], tensor)


def without(tensors, key):
    """A state dict that lacks a key."""
    rest = dict(tensors)
    del rest[key]
    return rest


def cat_keys(tensors):
    """Keys that no stock loader knows."""
    names = re.compile(r"^fusion_model\.|^cond_stage_model2\.|\.attn3\.|\.norm4\.")
    return [key for key in tensors if names.search(key)]


# What is accepted ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name, wrap", [("bare.ckpt", False), ("lightning.ckpt", True)])
@pytest.mark.parametrize("zipped", [True, False])
def test_reads_pickled_checkpoints(tiny, official, tmp_path, name, wrap, zipped):
    content = official
    if wrap:
        content = {"state_dict": official, "epoch": 3, "global_step": 40000, "callbacks": {}}
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert_same_parts(weights.read(tmp_path / name).parts, tiny[0])


def test_reads_safetensors_with_and_without_position_ids(tiny, official, tmp_path):
    extra = {
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "cond_stage_model2.encoder.vision_model.embeddings.position_ids": torch.arange(257)[None],
        "model_ema.decay": torch.zeros(1),
    }
    for tensors in (official, official | extra):
        save_file(tensors, tmp_path / "x.safetensors")
        assert_same_parts(weights.read(tmp_path / "x.safetensors").parts, tiny[0])


def test_reads_both_spellings_of_the_clip_keys(tiny, official, tmp_path):
    short = {}
    for key, tensor in official.items():
        short[key.replace("text_model.", "").replace("vision_model.", "")] = tensor
    assert len(short) == len(official) and short.keys() != official.keys()
    save_file(short, tmp_path / "x.safetensors")
    assert_same_parts(weights.read(tmp_path / "x.safetensors").parts, tiny[0])


@pytest.mark.parametrize("dtype", weights.DTYPES.values())
def test_reads_every_precision(official, tmp_path, dtype):
    converted = {key: tensor.to(dtype) for key, tensor in official.items()}
    save_file(converted, tmp_path / "x.safetensors")
    file = weights.read(tmp_path / "x.safetensors")
    for tensors in file.parts.values():
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}


def test_metadata_carries_the_architecture(tiny, tiny_file):
    file = weights.read(tiny_file)
    assert file.architecture.to_json() == tiny[1].to_json()
    assert file.architecture.sem_inpainter.num_attention_heads == 4  # tensors alone would say 1
    assert file.metadata["license"] == "MIT" and file.metadata["provenance"] == "random"


@pytest.mark.parametrize("part", ["sem_inpainter", "ref_adapter"])
def test_a_file_may_hold_one_part(tiny, tmp_path, part):
    weights.write_cat_weights(
        tmp_path / "x.safetensors", {part: tiny[0][part]}, tiny[1], licence="MIT", provenance="x"
    )
    file = weights.read(tmp_path / "x.safetensors")
    assert list(file.parts) == [part]
    other = "ref_adapter" if part == "sem_inpainter" else "sem_inpainter"
    assert getattr(file.architecture, other) is None
    with pytest.raises(WeightsError, match=f"but no {weights.TITLES[other]}"):
        file.require(other)


def test_split_leaves_no_cat_key_in_the_base(tiny, tiny_file):
    base, cat = weights.split(weights.read(tiny_file))
    assert list(cat) == ["sem_inpainter", "ref_adapter"]
    assert {key.split(".")[0] for key in base} == {"model", "first_stage_model", "cond_stage_model"}
    assert not cat_keys(base)
    parts = tiny[0]
    assert len(base) == len(parts["unet"]) + len(parts["vae"]) + len(parts["clip_text"])


# What is refused ----------------------------------------------------------------------------------


def refused(path, *words):
    with pytest.raises(WeightsError) as error:
        weights.read(path)
    message = str(error.value)
    assert path.name in message
    for word in words:
        assert word in message
    assert "\n" not in message and len(message) < 700


def test_missing_empty_and_foreign_files(tmp_path):
    refused(tmp_path / "none.safetensors", "does not exist")
    (tmp_path / "empty.safetensors").touch()
    refused(tmp_path / "empty.safetensors", "empty (0 bytes)")
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html><html>404</html>")
    refused(tmp_path / "page.safetensors", "not a weights file but a web page")


@pytest.mark.parametrize("keep", [0.99, 0.5, 0.001])
def test_truncated_files(tiny_file, official, tmp_path, keep):
    torch.save(official, tmp_path / "whole.ckpt")
    for source, name in ((tiny_file, "cut.safetensors"), (tmp_path / "whole.ckpt", "cut.ckpt")):
        content = source.read_bytes()
        (tmp_path / name).write_bytes(content[: int(len(content) * keep)])
        refused(tmp_path / name, "cut short")


def test_mislabelled_files(tiny_file, official, tmp_path):
    torch.save(official, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", "mislabelled", "pickle", ".ckpt")
    (tmp_path / "x.ckpt").write_bytes(tiny_file.read_bytes())
    refused(tmp_path / "x.ckpt", "mislabelled", "safetensors")


def test_another_model_and_unknown_keys(official, tmp_path):
    save_file({"lora_unet_x.lora_up.weight": torch.rand(3)}, tmp_path / "lora.safetensors")
    refused(tmp_path / "lora.safetensors", "not a CAT-Diffusion file", "lora_unet_x.lora_up.weight")
    save_file(official | {"conditioner.embedders.1.x": torch.rand(3)}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", "1 keys that are not part", "conditioner.embedders.1.x")


def test_missing_extra_and_misshapen_keys_are_named(official, tmp_path):
    name = "fusion_model.encoder.layers.1.mlp.fc2.bias"
    save_file(without(official, name), tmp_path / "x.safetensors")
    refused(
        tmp_path / "x.safetensors",
        "SemInpainter",
        "1 missing: encoder.layers.1.mlp.fc2.bias",
        "Expected the 48 keys",
    )
    save_file(
        official | {"fusion_model.encoder.layers.1.mlp.fc3.bias": torch.rand(3)},
        tmp_path / "x.safetensors",
    )
    refused(tmp_path / "x.safetensors", "1 unknown: encoder.layers.1.mlp.fc3.bias")
    save_file(official | {name: torch.rand(3)}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", "encoder.layers.1.mlp.fc2.bias is (3,) instead of (32,)")
    norm = "model.diffusion_model.middle_block.1.transformer_blocks.0.norm4.weight"
    save_file(without(official, norm), tmp_path / "x.safetensors")
    refused(
        tmp_path / "x.safetensors",
        "RefAdapter",
        "1 missing: middle_block.1.transformer_blocks.0.norm4.weight",
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", weights.DTYPES.values())
def test_numbers_that_are_none(official, tmp_path, value, dtype):
    broken = official["fusion_model.post_layernorm.bias"].clone().to(dtype)
    broken[7] = value
    save_file(official | {"fusion_model.post_layernorm.bias": broken}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", "post_layernorm.bias", "NaN or Inf")


def test_other_number_types(official, tmp_path):
    save_file(
        official | {"fusion_model.post_layernorm.bias": torch.ones(32, dtype=torch.int32)},
        tmp_path / "x.safetensors",
    )
    refused(tmp_path / "x.safetensors", "int32", "expected fp32, fp16 or bf16")


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt"])
def test_doubles_are_read_as_fp32_and_said(tiny, official, tmp_path, caplog, name):
    doubles = {key: tensor.double() for key, tensor in official.items()}
    (save_file if name.endswith("s") else torch.save)(doubles, tmp_path / name)
    with caplog.at_level(logging.INFO):
        file = weights.read(tmp_path / name)
    assert_same_parts(file.parts, tiny[0])
    assert file.parts["vae"]["post_quant_conv.bias"].dtype == torch.float32
    count = len(tiny[0]["vae"])
    assert f"{name}: {count} tensors of the VAE are fp64 and are read as fp32." in caplog.text


# Left beside the weights by training and merging --------------------------------------------------


LEFT_OVER = [
    "embedding_manager.embedder.x",
    "denoiser.sigmas",
    "scale_factor",
    "cond_stage_model.logit_scale",
    "ztsnr",
    "first_stage_model.loss.logvar",
    "first_stage_model.model_ema.decay",
    "model_ema.diffusion_modelinput_blocks00weight",
    "cond_stage_model2.encoder.logit_scale",
]


@pytest.mark.parametrize("key", LEFT_OVER)
def test_left_over_keys_are_left_out_and_named(tiny, official, tmp_path, caplog, key):
    path = tmp_path / "merged.safetensors"
    save_file(official | {key: torch.ones(2)}, path)
    assert weights.parts_inside(path) == set(tiny[0])
    with caplog.at_level(logging.INFO):
        file = weights.read(path)
    assert_same_parts(file.parts, tiny[0])
    assert f"merged.safetensors: left out 1 keys of no part: {key}." in caplog.text
    base, _ = weights.split(file)
    assert len(base) == sum(len(tiny[0][part]) for part in ("unet", "vae", "clip_text"))


@pytest.mark.parametrize("wrapping", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_ddp_and_compile_go(tiny, official, tmp_path, wrapping):
    wrapped = {f"{wrapping}{key}": tensor for key, tensor in official.items()}
    save_file(wrapped, tmp_path / "x.safetensors")
    assert_same_parts(weights.read(tmp_path / "x.safetensors").parts, tiny[0])


def test_a_weight_that_is_there_twice_is_refused(official, tmp_path):
    key = "fusion_model.post_layernorm.bias"
    save_file(official | {f"module.{key}": torch.ones(32)}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", "1 keys that are not part", key)


@pytest.fixture
def refused_with(tiny, tmp_path):
    """A RefAdapter whose header is changed must be refused, with a word in the message."""
    parts, architecture = tiny
    tensors = weights.flat({"ref_adapter": parts["ref_adapter"]})
    header = weights.cat_metadata({"ref_adapter": {}}, architecture, licence="MIT", provenance="x")

    def refused_with(change, word):
        save_file(tensors, tmp_path / "x.safetensors", header | change)
        refused(tmp_path / "x.safetensors", word)

    return refused_with


@pytest.mark.parametrize(
    "change, word",
    [
        ({"format_version": "99"}, "Update the pack"),
        ({"architecture": "{"}, "cannot be read"),
        ({"architecture": "{}"}, "disagree about the RefAdapter"),
    ],
)
def test_metadata_that_tells_nothing(refused_with, change, word):
    refused_with(change, word)


@pytest.mark.parametrize(
    "truth, lie, word",
    [
        ('"visual_size": 32', '"visual_size": "32"', "expected a whole number"),
        ('"visual_size": 32', '"visual_size": -1', "expected a whole number"),
        ('"visual_size": 32', '"visual_size": 33', "disagree about the RefAdapter (visual_size)"),
        ('"num_heads": 4', '"num_heads": 5', "do not divide"),
        ('"num_heads": 4', '"num_heads": 0', "num_heads in the metadata is 0, expected"),
        ('"unet_num_heads": 4', '"unet_num_heads": "x"', "expected a whole number from 1"),
        ('"input_blocks.1.1.transformer_blocks.0"', '""', "disagree"),
    ],
)
def test_metadata_that_lies(tiny, refused_with, truth, lie, word):
    text = dataclasses.replace(tiny[1], sem_inpainter=None).to_json()
    assert truth in text
    refused_with({"architecture": text.replace(truth, lie)}, word)


def test_heads_of_no_number_are_a_lie(tiny, tmp_path):
    """Of the SemInpainter, too: 0 is not "unknown"."""
    parts, architecture = tiny
    inpainter = dataclasses.replace(architecture.sem_inpainter, num_attention_heads=0)
    header = weights.cat_metadata(
        {"sem_inpainter": {}},
        dataclasses.replace(architecture, sem_inpainter=inpainter),
        licence="MIT",
        provenance="x",
    )
    tensors = weights.flat({"sem_inpainter": parts["sem_inpainter"]})
    save_file(tensors, tmp_path / "x.safetensors", header)
    refused(tmp_path / "x.safetensors", "num_attention_heads in the metadata is 0, expected")


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_with_code_is_refused_and_not_run(official, tmp_path):
    torch.save(
        {"state_dict": official, "callbacks": Evil(tmp_path / "ran")}, tmp_path / "evil.ckpt"
    )
    refused(
        tmp_path / "evil.ckpt",
        "could run code",
        "nothing was run",
        "posix.system",
        "tools/convert.py",
    )
    (tmp_path / "bare.ckpt").write_bytes(pickle.dumps(Evil(tmp_path / "ran"), protocol=2))
    refused(tmp_path / "bare.ckpt", "nothing in it was run")
    with zipfile.ZipFile(tmp_path / "zip.ckpt", "w") as file:
        file.writestr("a/data.pkl", pickle.dumps(Evil(tmp_path / "ran"), protocol=2))
    refused(tmp_path / "zip.ckpt", "run")
    assert not (tmp_path / "ran").exists()


class Callback(dict):
    """Foreign like Lightning's callbacks: a class as a key, state, items, arguments."""

    made = 0

    def __init__(self, *args):
        Callback.made += 1

    def __reduce__(self):
        return Callback, (1, 2), {"state": 3}, None, iter([("a", 1)])


def test_inert_objects_gives_the_tensors_and_runs_nothing(tiny, official, tmp_path):
    path = tmp_path / "lightning.ckpt"
    torch.save({"state_dict": official, "callbacks": {Callback: Callback()}}, path)
    refused(path, "Callback", "--inert-objects")
    made = Callback.made
    assert_same_parts(weights.read(path, inert_objects=True).parts, tiny[0])
    assert Callback.made == made
    torch.save({"state_dict": official, "callbacks": Evil(tmp_path / "ran")}, path)
    with pytest.raises(WeightsError, match=r"posix\.system.*nothing in it was run"):
        weights.read(path, inert_objects=True)
    assert not (tmp_path / "ran").exists()


# Writing ------------------------------------------------------------------------------------------


def test_writing_never_overwrites_unless_told_and_leaves_no_scraps(tiny, tiny_file, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_text("precious")
    with pytest.raises(WeightsError, match="exists already"):
        weights.write_cat_weights(path, *tiny, licence="MIT", provenance="x")
    assert path.read_text() == "precious"
    weights.write_cat_weights(path, *tiny, licence="MIT", provenance="x", overwrite=True)
    assert_same_parts(weights.read(path).parts, tiny[0])
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_a_failed_write_keeps_the_old_file(tiny, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_text("precious")
    broken = {"fusion_model.x": torch.empty(3, device="meta")}
    with pytest.raises(NotImplementedError):  # there is nothing in it to copy
        weights.save(path, broken, {}, overwrite=True)
    assert path.read_text() == "precious" and os.listdir(tmp_path) == ["x.safetensors"]
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match="Cannot write"):
        weights.save(tmp_path / "file" / "x.safetensors", {"a": torch.ones(1)}, {})


def test_nothing_of_cat_is_not_a_cat_file(tiny, tmp_path):
    with pytest.raises(WeightsError, match="the tensors are VAE"):
        weights.write_cat_weights(
            tmp_path / "x.safetensors", {"vae": tiny[0]["vae"]}, tiny[1], licence="", provenance=""
        )


# tools/convert.py ---------------------------------------------------------------------------------


def convert(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "tools/convert.py", *map(str, arguments)],
        capture_output=True,
        text=True,
    )


def test_a_reader_that_copies_is_asked_once(tiny, tiny_file):
    asked = []

    def reader(path):
        asked.append(path)
        return weights.load_safetensors(path)

    assert_same_parts(weights.read(tiny_file, reader, mapped=False).parts, tiny[0])
    assert asked == [str(tiny_file)]
    assert_same_parts(weights.read(tiny_file, reader).parts, tiny[0])
    assert len(asked) == 1 + len(tiny[0])


def test_numbers_may_be_checked_when_a_part_is_wanted(tiny, tmp_path):
    broken_vae = {key: tensor * torch.inf for key, tensor in tiny[0]["vae"].items()}
    tensors = weights.flat({**tiny[0], "vae": broken_vae})
    header = weights.header(*tiny, licence="", provenance="")
    save_file(tensors, tmp_path / "y.safetensors", header)
    file = weights.read(tmp_path / "y.safetensors", numbers=False)
    assert set(file.checked("unet")) == set(tiny[0]["unet"])
    with pytest.raises(WeightsError, match=r"VAE in y\.safetensors contains NaN or Inf"):
        file.checked("vae")


@pytest.mark.slow
def test_convert_splits_and_refuses_to_overwrite(tiny, official, tmp_path):
    torch.save({"state_dict": official, "callbacks": Callback()}, tmp_path / "in.ckpt")
    outputs = [
        "--base",
        tmp_path / "base.safetensors",
        "--cat-weights",
        tmp_path / "cat.safetensors",
        "--clip-vision",
        tmp_path / "vision.safetensors",
    ]
    run = convert(tmp_path / "in.ckpt", *outputs)
    assert run.returncode == 1 and "could run code" in run.stderr and "Traceback" not in run.stderr
    run = convert(
        tmp_path / "in.ckpt", *outputs, "--inert-objects", "--licence", "MIT", "--dtype", "bf16"
    )
    assert run.returncode == 0, run.stderr
    cat = weights.read(tmp_path / "cat.safetensors")
    assert set(cat.parts) == {"sem_inpainter", "ref_adapter"} and cat.metadata["license"] == "MIT"
    base = load_file(tmp_path / "base.safetensors")
    assert not cat_keys(base)
    assert {tensor.dtype for tensor in base.values()} == {torch.bfloat16}
    for key in load_file(tmp_path / "vision.safetensors"):
        assert key.startswith("vision_model.")
    run = convert(tmp_path / "cat.safetensors", "--cat-weights", tmp_path / "base.safetensors")
    assert run.returncode == 1 and "exists already" in run.stderr
    run = convert(tmp_path / "cat.safetensors", "--base", tmp_path / "new.safetensors")
    assert run.returncode == 1 and "no U-Net" in run.stderr
    assert convert(tmp_path / "cat.safetensors").returncode == 2


@pytest.mark.slow
def test_convert_writes_a_lora_of_its_own(tiny, tmp_path):
    parts, architecture = tiny
    lora = unet_lora({"unet": parts["unet"]}, rank=2, seed=0).state_dict()
    trained = {"ref_adapter": parts["ref_adapter"], "unet_lora": lora}
    header = weights.header(trained, architecture, licence="", provenance="")
    weights.save(tmp_path / "trained.safetensors", weights.flat(trained), header)
    out = tmp_path / "lora.safetensors"
    run = convert(tmp_path / "trained.safetensors", "--lora", out)
    assert run.returncode == 0, run.stderr
    written = load_file(out)
    assert {"diffusion_model." + key for key in lora} == set(written)
    run = convert(tmp_path / "trained.safetensors", "--cat-weights", tmp_path / "cat.safetensors")
    assert "The U-Net's LoRA is in none of the outputs" in run.stdout
    assert set(weights.read(tmp_path / "cat.safetensors").parts) == {"ref_adapter"}
    run = convert(tmp_path / "cat.safetensors", "--lora", tmp_path / "none.safetensors")
    assert run.returncode == 1 and "but no U-Net's LoRA" in run.stderr


def test_header_is_strings_only(tiny_file):
    size = int.from_bytes(tiny_file.read_bytes()[:8], "little")
    header = json.loads(tiny_file.read_bytes()[8 : 8 + size])["__metadata__"]
    assert header["format"] == "cat-diffusion"
    assert {type(value) for value in header.values()} == {str}


def test_a_number_too_large_for_fp16_is_not_written(tmp_path):
    with pytest.raises(WeightsError, match=r"does not fit into fp16.*Use bf16"):
        weights.save(tmp_path / "x.safetensors", {"a": torch.tensor([1e5])}, {}, torch.float16)
    assert os.listdir(tmp_path) == []
    weights.save(tmp_path / "x.safetensors", {"a": torch.tensor([1e5])}, {}, torch.bfloat16)


def test_the_command_that_the_error_names_makes_a_loadable_checkpoint(tiny, official, tmp_path):
    path = tmp_path / "a folder/lightning.ckpt"
    path.parent.mkdir()
    torch.save({"state_dict": official, "callbacks": Callback()}, path)
    with pytest.raises(WeightsError) as error:
        weights.read(path)
    command = shlex.split(str(error.value).partition("tools/convert.py ")[2])
    run = convert(*command)
    assert run.returncode == 0, run.stderr
    assert_same_parts(weights.read(path.with_suffix(".safetensors")).parts, tiny[0])


def test_a_file_that_goes_away_while_it_is_read_is_said(official, tmp_path):
    save_file(official, tmp_path / "x.safetensors")
    file = weights.read(tmp_path / "x.safetensors", numbers=False)
    (tmp_path / "x.safetensors").unlink()
    with pytest.raises(
        WeightsError, match=r"x\.safetensors was changed or removed while it was read"
    ):
        file.checked("vae")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt"])
def test_the_file_of_each_part_leaves_the_memory_with_the_part(official, tmp_path, name):
    """Each part has a mapping of its own.

    So a loader never holds the whole file beside the models.
    """
    save = save_file if name.endswith("s") else torch.save
    save(official, tmp_path / name)

    def mapped():
        maps = Path("/proc/self/maps").read_text().splitlines()
        return sum(line.endswith(str(tmp_path / name)) for line in maps)

    file = weights.read(tmp_path / name, numbers=False)
    assert mapped() == 0
    for wanted, part in enumerate(file.parts, start=1):
        file.checked(part)
        assert mapped() == wanted
    for part in list(file.parts):
        file = file.without(part)
        assert part not in file.parts
        assert mapped() == len(file.parts)
    assert mapped() == 0


def test_old_style_pickles_with_objects_are_called_so(official, tmp_path):
    torch.save(
        {"state_dict": official, "callbacks": Callback()},
        tmp_path / "x.ckpt",
        _use_new_zipfile_serialization=False,
    )
    refused(tmp_path / "x.ckpt", "Python objects besides tensors")
    torch.save({0: torch.ones(1), "iteration": 3}, tmp_path / "x.ckpt")
    refused(tmp_path / "x.ckpt", "not a CAT-Diffusion file")
