"""Checkpoints of torch.save: what is beside the weights, what lies about them, what would run."""

import argparse
import collections
import enum
import io
import os
import pathlib
import pickle
import subprocess
import sys
import types
import zipfile
from datetime import datetime

import numpy
import pytest
import torch

from cat_diffusion.cat_core import weights
from cat_diffusion.cat_core.weights import WeightsError


class Phase(enum.Enum):
    """As training programs keep where they are."""

    FIT = "fit"


KEY = "fusion_model.post_layernorm.bias"


@pytest.fixture(scope="module")
def inpainter(tiny):
    """The SemInpainter alone as a flat state dict; small, as every case writes it."""
    return weights.flat({"sem_inpainter": tiny[0]["sem_inpainter"]})


def assert_read(path, inpainter, **options):
    found = weights.flat(weights.read(path, **options).parts)
    assert found.keys() == inpainter.keys()
    for key, tensor in inpainter.items():
        assert torch.equal(found[key], tensor)


def refused(path, *words):
    with pytest.raises(WeightsError) as error:
        weights.read(path)
    message = str(error.value)
    assert path.name in message and "\n" not in message and len(message) < 700
    for word in words:
        assert word in message


def rewritten(path, change):
    """Write the zip again with each record as `change(name, content)` gives it."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, change(name, content))


def omegaconf_node():
    """An object as OmegaConf's are pickled: a foreign class, a state, one of typing's names."""
    module = types.ModuleType("omegaconf.dictconfig")
    node = type("DictConfig", (), {"__module__": module.__name__})
    module.DictConfig = node
    sys.modules["omegaconf"] = types.ModuleType("omegaconf")
    sys.modules["omegaconf.dictconfig"] = module
    made = node()
    made.__dict__.update(_content={"lr": 1e-4}, _metadata=collections.deque([dict]))
    return made


BESIDE = {
    "numpy number": lambda: numpy.float64(0.25),
    "numpy integer": lambda: numpy.int64(7),
    "numpy array": lambda: numpy.arange(6.0).reshape(2, 3),
    "numpy objects": lambda: numpy.array([None, "x"], dtype=object),
    "dtype": lambda: numpy.dtype("float32"),
    "deque": lambda: collections.deque([1, 2], maxlen=4),
    "defaultdict": lambda: collections.defaultdict(list, {"a": [1]}),
    "OrderedDict": lambda: collections.OrderedDict(a=1),
    "Counter": lambda: collections.Counter("abc"),
    "omegaconf": omegaconf_node,
    "Path": lambda: pathlib.Path("runs/1"),
    "Windows path": lambda: pathlib.PureWindowsPath("C:/runs"),
    "enum": lambda: Phase.FIT,
    "Namespace": lambda: argparse.Namespace(lr=1e-4, out=pathlib.Path("x")),
    "sets": lambda: ({1, "x"}, frozenset({2.5})),
    "numbers": lambda: (1 << 80, -3, 2.5, 1j, True, None, b"x" * 300, bytearray(b"y"), range(3)),
    "torch": lambda: (
        torch.float16,
        torch.Size([2]),
        torch.device("cpu"),
        torch.ones(2).to_sparse(),
    ),
    "parameter": lambda: torch.nn.Parameter(torch.ones(2)),
    "time": lambda: datetime(2024, 10, 4),
}
FORMS = {
    "zip": {},
    "zip, protocol 4": {"pickle_protocol": 4},
    "zip, protocol 5": {"pickle_protocol": 5},
    "older": {"_use_new_zipfile_serialization": False},
    "older, protocol 4": {"_use_new_zipfile_serialization": False, "pickle_protocol": 4},
    "older, protocol 5": {"_use_new_zipfile_serialization": False, "pickle_protocol": 5},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", BESIDE)
def test_plain_data_beside_the_weights_is_read(inpainter, tmp_path, kind, form):
    path = tmp_path / "lightning.ckpt"
    torch.save({"state_dict": inpainter, "besides": BESIDE[kind]()}, path, **FORMS[form])
    sys.modules.pop("omegaconf", None)
    sys.modules.pop("omegaconf.dictconfig", None)
    assert_read(path, inpainter)
    assert "omegaconf" not in sys.modules


@pytest.mark.parametrize("form", ["zip", "older"])
def test_the_names_of_numpy_1_are_known(inpainter, tmp_path, form):
    path = tmp_path / "lightning.ckpt"
    content = {"state_dict": inpainter, "best": numpy.float64(0.5), "curve": numpy.ones(3)}
    torch.save(content, path, **FORMS[form])

    def older_names(name, stored):
        return stored.replace(b"numpy._core.", b"numpy.core.")

    if form == "zip":
        rewritten(path, older_names)
    else:
        path.write_bytes(older_names(path.name, path.read_bytes()))
    assert b"numpy.core.multiarray" in path.read_bytes()
    assert_read(path, inpainter)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict", "module"])
@pytest.mark.parametrize("outer", [None, "model"])
def test_state_dicts_in_wrappers(inpainter, tmp_path, wrapper, outer):
    content = {wrapper: inpainter, "optimizer": {"state": {0: torch.ones(3)}}}
    torch.save({outer: content} if outer else content, tmp_path / "x.ckpt")
    assert_read(tmp_path / "x.ckpt", inpainter)


@pytest.mark.parametrize("form", ["zip", "older"])
@pytest.mark.parametrize("mapped", [True, False])
def test_views_and_tied_tensors(inpainter, tmp_path, form, mapped):
    """Stored once, and with strides of their own."""
    weight = "fusion_model.encoder.layers.0.mlp.fc1.weight"
    other = "fusion_model.encoder.layers.1.mlp.fc1.weight"
    turned = inpainter[weight].t().contiguous().t()
    assert not turned.is_contiguous()
    tied = inpainter | {weight: turned, other: turned}
    torch.save(tied, tmp_path / "x.ckpt", **FORMS[form])
    assert_read(tmp_path / "x.ckpt", tied, mapped=mapped)


# What lies ----------------------------------------------------------------------------------------


def test_a_record_that_is_shorter_than_its_storage_is_refused(inpainter, tmp_path):
    """The bytes that follow it belong to another tensor."""
    torch.save(inpainter, tmp_path / "x.ckpt")
    size = list(inpainter.values())[7].untyped_storage().nbytes()

    def shortened(name, content):
        return content[:-4] if name.endswith("/data/7") else content

    rewritten(tmp_path / "x.ckpt", shortened)
    refused(tmp_path / "x.ckpt", f"storage '7' has {size - 4:,} bytes, its pickle says {size:,}")


def test_a_record_that_is_missing_or_compressed_is_refused(inpainter, tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save(inpainter, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    refused(path, "compressed or encrypted")
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            if not name.endswith("/data/3"):
                archive.writestr(name, content)
    refused(path, "its zip lacks", "data/3")


def test_an_older_file_that_lacks_its_last_bytes_is_refused(inpainter, tmp_path):
    torch.save(inpainter, tmp_path / "x.ckpt", **FORMS["older"])
    whole = (tmp_path / "x.ckpt").read_bytes()
    (tmp_path / "x.ckpt").write_bytes(whole[:-3])
    refused(tmp_path / "x.ckpt", "ends 3 bytes too early")


class Rebuilt:
    """Pickled as a tensor of PyTorch with any geometry."""

    def __init__(self, *geometry):
        self.geometry = geometry

    def __reduce__(self):
        storage = torch.ones(8).storage()
        arguments = (storage, *self.geometry, False, collections.OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


@pytest.mark.parametrize("form", ["zip", "older"])
@pytest.mark.parametrize(
    "geometry, words",
    [
        ((0, (1_000_000, 40_000), (0, 0)), "asks for 40,000,000,000 numbers of a storage of 8"),
        ((0, (9,), (1,)), "reaches beyond its storage of 8 numbers"),
        ((1, (8,), (1,)), "reaches beyond its storage of 8 numbers"),
        ((0, (2, 2), (1 << 61, 1)), "reaches beyond its storage of 8 numbers"),
        ((-1, (8,), (1,)), "a size or stride that is no number"),
        ((0, (8,), (-1,)), "a size or stride that is no number"),
        ((0, (1 << 70,), (1,)), "a size or stride that is no number"),
        ((0, (8.0,), (1,)), "a size or stride that is no number"),
        ((0, (8,), (1, 1)), "a size or stride that is no number"),
    ],
)
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_tensors_that_ask_for_more_than_is_stored(inpainter, tmp_path, form, geometry, words):
    torch.save(inpainter | {KEY: Rebuilt(*geometry)}, tmp_path / "x.ckpt", **FORMS[form])
    refused(tmp_path / "x.ckpt", words, "nothing in it was run")


def test_one_storage_under_many_keys_does_not_fill_the_memory(tmp_path):
    same = torch.ones(1000)
    many = {f"fusion_model.encoder.layers.{layer}.x": same for layer in range(100)}
    torch.save(many, tmp_path / "x.ckpt")
    refused(tmp_path / "x.ckpt", "its tensors ask for 400,000", "Expected each number to be stored")


@pytest.mark.parametrize(
    "value, words",
    [
        (torch.ones(32).to_sparse(), "_rebuild_sparse_tensor"),
        (torch.ones(32, device="meta"), "_rebuild_meta_tensor_no_storage"),
        (torch.quantize_per_tensor(torch.ones(32), 0.1, 0, torch.qint8), "_rebuild_qtensor"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "_rebuild_nested_tensor"),
        (3, "of the type int"),
        ([1.0], "of the type list"),
        (numpy.ones(32), "multiarray._reconstruct"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_a_weight_that_is_no_dense_tensor_is_named(inpainter, tmp_path, value, words):
    torch.save(inpainter | {KEY: value}, tmp_path / "x.ckpt")
    refused(tmp_path / "x.ckpt", KEY, words, "expected a dense tensor")


def test_a_scalar_tensor_is_of_another_shape(inpainter, tmp_path):
    torch.save(inpainter | {KEY: torch.tensor(1.0)}, tmp_path / "x.ckpt")
    refused(tmp_path / "x.ckpt", "post_layernorm.bias is () instead of (32,)")


def test_a_whole_model_and_a_program_are_called_so(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.ckpt")
    refused(tmp_path / "model.ckpt", "torch.nn.modules.linear.Linear")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "jit.ckpt")
    refused(tmp_path / "jit.ckpt", "TorchScript")
    torch.save(torch.ones(3), tmp_path / "one.ckpt")
    refused(tmp_path / "one.ckpt", "is one tensor, expected a state dict")


# What would run -----------------------------------------------------------------------------------


class Call:
    """Unpickling it calls a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class State(Call):
    """Unpickling it gives a state to what a function returns."""

    def __reduce__(self):
        return (*self.call, {"x": 1}, iter([1]), iter([("a", 2)]))


def attacks(marker):
    """Each makes the file `marker` if a pickle that holds it is run."""
    touch = f"touch {marker}"
    write = f"open({str(marker)!r}, 'w').close()"
    inner = io.BytesIO()
    torch.save(Call(os.system, touch), inner)
    return {
        "system": Call(os.system, touch),
        "Popen": Call(subprocess.Popen, touch, -1, None, None, None, None, None, True, True),
        "eval": Call(eval, write),
        "exec": Call(exec, write),
        "state": State(os.system, touch),
        "path": Call(pathlib.Path.touch, pathlib.Path(marker)),
        "numpy": Call(numpy.save, str(marker), 1),
        "torch": Call(torch.save, {}, str(marker)),
        "pickle in pickle": Call(pickle.loads, pickle.dumps(Call(os.system, touch))),
        "torch in torch": Call(torch.storage._load_from_bytes, inner.getvalue()),
        "in a key": {Call(os.system, touch): 1},
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("attack", attacks("x"))
@pytest.mark.parametrize("inert_objects", [False, True])
def test_nothing_runs(inpainter, tmp_path, attack, form, inert_objects):
    marker = tmp_path / "ran"
    content = {"state_dict": inpainter, "x": attacks(marker)[attack]}
    torch.save(content, tmp_path / "evil.ckpt", **FORMS[form])
    try:
        weights.read(tmp_path / "evil.ckpt", inert_objects=inert_objects)
    except WeightsError as error:
        assert "nothing in it was run" in str(error) or "nothing was run" in str(error)
    assert not list(tmp_path.glob("ran*"))


def test_no_module_that_a_pickle_names_is_imported(inpainter, tmp_path, monkeypatch):
    (tmp_path / "theirs.py").write_text(
        "import enum\nclass Phase(enum.Enum):\n    FIT = 'fit'\nclass Callback:\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import theirs

    content = {"state_dict": inpainter, "phase": theirs.Phase.FIT}
    torch.save(content, tmp_path / "enum.ckpt")
    torch.save(content | {"callback": theirs.Callback()}, tmp_path / "callback.ckpt")
    del sys.modules["theirs"]
    assert_read(tmp_path / "enum.ckpt", inpainter)
    refused(tmp_path / "callback.ckpt", "theirs.Callback", "--inert-objects")
    assert_read(tmp_path / "callback.ckpt", inpainter, inert_objects=True)
    assert "theirs" not in sys.modules


@pytest.mark.parametrize("form", ["zip", "older"])
def test_mutated_files_are_read_or_refused_in_a_sentence(inpainter, tmp_path, form):
    """Every byte of the pickle, once, is another one."""
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": {KEY: inpainter[KEY]}, "best": numpy.float64(1)}, path, **FORMS[form])
    whole = path.read_bytes()
    start = whole.index(b"\x80\x02")
    end = min(len(whole), start + 900)
    for position in range(start, end):
        changed = bytearray(whole)
        changed[position] ^= 1 + position % 255
        path.write_bytes(changed)
        with pytest.raises(WeightsError):
            weights.read(path)


# What is no checkpoint ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, words",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><title>private</title>", "a web page"),
        (b'{"private": 1}', "JSON text"),
        (b"GGUF\x03\x00\x00\x00private", "a GGUF file"),
        (b"\x89PNG\r\n\x1a\nprivate", "a picture"),
        (b"\x1f\x8b\x08private", "an archive"),
        (b"root:private:0:0", "it starts like none"),
        ((1 << 40).to_bytes(8, "little") + b'{"private', "header has 1,099,511,627,776 bytes"),
    ],
)
@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt"])
def test_other_files_are_called_what_they_are_and_not_quoted(tmp_path, content, words, name):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, words)
    with pytest.raises(WeightsError) as error:
        weights.read(tmp_path / name)
    assert "private" not in str(error.value)
