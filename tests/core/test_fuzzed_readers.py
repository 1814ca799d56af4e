"""Each reader on files that nobody wrote: a right result, or a sentence that helps."""

import io
import json
import pickle
import zipfile

import pytest
import torch
from contract import bounded, flaw
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cat_diffusion.cat_core import weights
from cat_diffusion.cat_core.data import manifest, masks
from cat_diffusion.cat_core.data.manifest import ManifestError, Record
from cat_diffusion.cat_core.data.masks import SampleError
from cat_diffusion.cat_core.errors import CatError
from cat_diffusion.cat_core.training.log import TrainingLog
from cat_diffusion.cat_core.training.settings import Settings
from cat_diffusion.cat_core.training.shards import ShardedSamples
from cat_diffusion.cat_core.training.stores import FreshSamples

pytestmark = pytest.mark.slow

SIZES = st.sampled_from([0, 1, 2, 3, 32, 256, 1 << 31, 1 << 40, -1]) | st.integers()
SCALARS = st.none() | st.booleans() | st.floats() | SIZES | st.text(max_size=20)
JSON = st.recursive(
    SCALARS,
    lambda inside: (
        st.lists(inside, max_size=4) | st.dictionaries(st.text(max_size=8), inside, max_size=3)
    ),
    max_leaves=8,
)
LONGEST_WITH_KEYS = 1200  # letters of a message that names ten tensors
FORMATS = {"PNG": "png", "JPEG": "jpg", "TIFF": "tif", "GIF": "gif", "BMP": "bmp", "WEBP": "webp"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder for the one file that is tried."""
    return tmp_path_factory.mktemp("fuzzed")


@st.composite
def damaged(draw, content: bytes, important: int = 0) -> bytes:
    """A file with a few bytes changed, left out, put in or repeated.

    Args:
        important: how many bytes at the start are changed as often as all others.
    """
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        end = max(len(changed) - 1, 0)
        place = draw(st.integers(0, min(important, end)) | st.integers(0, end))
        change = draw(st.sampled_from(("byte", "cut", "gap", "more", "bytes")))
        if change == "byte" and changed:
            changed[place] = draw(st.integers(0, 255))
        elif change == "cut":
            del changed[place:]
        elif change == "gap":
            del changed[place : place + draw(st.integers(1, 64))]
        elif change == "more":
            changed[place:place] = changed[:place][-draw(st.integers(1, 64)) :]
        else:
            new = draw(st.binary(min_size=1, max_size=8))
            changed[place : place + len(new)] = new
    return bytes(changed)


def answers(read):
    """What a reader answers, None for a sentence; any other error comes out."""
    with bounded():
        try:
            return read()
        except CatError as error:
            # A sample's reason is counted and listed, no sentence.
            said = flaw(str(error) + "." * isinstance(error, SampleError), LONGEST_WITH_KEYS)
            assert said is None, said
    return None


# Weights ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cat_file(tiny, tmp_path_factory):
    """A CAT weights file without base model."""
    parts, architecture = tiny
    path = tmp_path_factory.mktemp("whole") / "cat.safetensors"
    cat_parts = {part: parts[part] for part in ("sem_inpainter", "ref_adapter")}
    weights.write_cat_weights(path, cat_parts, architecture, licence="MIT", provenance="random")
    return path.read_bytes()


def read_weights(path, content):
    """Every number of a file of weights."""
    path.write_bytes(content)
    file = answers(lambda: weights.read(path))
    if file is not None:
        for tensors in file.parts.values():
            assert all(tensor.isfinite().all() for tensor in tensors.values())
    return file


@given(data=st.data())
def test_bytes_of_safetensors(cat_file, place, data):
    header = 8 + int.from_bytes(cat_file[:8], "little")
    read_weights(place / "x.safetensors", data.draw(damaged(cat_file, header)))


@given(data=st.data())
def test_headers_of_safetensors(cat_file, place, data):
    """Facts of one tensor or of the file are another value of any kind."""
    length = int.from_bytes(cat_file[:8], "little")
    header = json.loads(cat_file[8 : 8 + length])
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(sorted(header)))
        fact = data.draw(st.sampled_from(sorted(header[key])))
        value = header[key][fact]
        if fact == "architecture":
            facts = json.loads(value)
            owner = data.draw(st.sampled_from([facts, *filter(is_object, facts.values())]))
            owner[data.draw(st.sampled_from(sorted(owner)))] = data.draw(JSON)
            header[key][fact] = json.dumps(facts)
        elif isinstance(value, list) and value and data.draw(st.booleans()):
            place_in_list = data.draw(st.integers(0, len(value) - 1))
            value[place_in_list] = data.draw(SIZES)
        else:
            header[key][fact] = data.draw(JSON | st.text(max_size=10))
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + cat_file[8 + length :]
    read_weights(place / "x.safetensors", content)


def is_object(value) -> bool:
    return isinstance(value, dict) and bool(value)


@pytest.fixture(scope="module")
def torch_files(tiny):
    """RefAdapters in PyTorch's two formats, as a Lightning run has them."""
    parts, _ = tiny
    state = {"state_dict": weights.flat({"ref_adapter": parts["ref_adapter"]}), "epoch": 3}
    files = []
    for as_zip in (True, False):
        buffer = io.BytesIO()
        torch.save(state, buffer, _use_new_zipfile_serialization=as_zip)
        files.append(buffer.getvalue())
    return files


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
@given(data=st.data())
def test_bytes_of_torch_files(torch_files, place, old, data):
    content = torch_files[old]
    read_weights(place / "x.ckpt", data.draw(damaged(content, 20_000)))


@given(data=st.data())
def test_pickles_inside_torch_files(torch_files, place, data):
    """A whole zip whose pickle is not."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(torch_files[0])) as whole, zipfile.ZipFile(buffer, "w") as zip:
        for name in whole.namelist():
            content = whole.read(name)
            if name.endswith("data.pkl"):
                content = data.draw(damaged(content))
            zip.writestr(name, content)
    read_weights(place / "x.ckpt", buffer.getvalue())


@given(value=JSON, protocol=st.sampled_from([2, 3, 4, 5]))
def test_pickles_of_anything(place, value, protocol):
    """None of them holds weights."""
    assert read_weights(place / "x.ckpt", pickle.dumps(value, protocol)) is None


@given(content=st.binary(max_size=200), ending=st.sampled_from(["safetensors", "ckpt"]))
def test_any_bytes_are_no_weights(place, content, ending):
    assert read_weights(place / f"x.{ending}", content) is None


# Manifests -------------------------------------------------------------------------------------

KEYS = st.sampled_from(["id", "image", "mask", "box", "label", "caption", "split", "more"])
NAMES = st.text(min_size=1, max_size=12) | st.sampled_from(["a.png", "../a.png", "/a", "C:\\a"])
FIELDS = {"id": NAMES, "image": NAMES, "caption": NAMES}
FRACTIONS = st.floats(-0.5, 1.5) | st.sampled_from([0, 1, float("nan")])
VALUES = JSON | NAMES | st.lists(FRACTIONS, min_size=4, max_size=4)
LINES = st.binary(max_size=60) | st.dictionaries(KEYS, VALUES).map(lambda x: json.dumps(x).encode())


@given(lines=st.lists(LINES, max_size=4))
def test_manifests(place, lines):
    path = place / "manifest.jsonl"
    path.write_bytes(b"\n".join(lines))
    records = answers(lambda: manifest.read(path))
    if records:
        manifest.write(path, records)
        assert manifest.read(path) == records


@given(entry=st.fixed_dictionaries(FIELDS))
def test_records_come_back_as_they_were_written(place, entry):
    try:
        record = Record(**entry)
    except ManifestError:  # of which `manifest.read` makes a sentence
        return
    manifest.write(place / "manifest.jsonl", [record])
    assert manifest.read(place / "manifest.jsonl") == [record]


# Training's files ------------------------------------------------------------------------------


@given(text=JSON.map(json.dumps).map(str.encode) | st.binary(max_size=60))
def test_what_a_cache_says_of_itself(place, text):
    record = Record("a", "a.png", label="cup", box=(0.1, 0.1, 0.6, 0.6))
    fresh = FreshSamples([record], place, encoders=None, objective="distillation")
    folder = place / "cache"
    folder.mkdir(exist_ok=True)
    (folder / "cache.json").write_bytes(text)
    store = answers(lambda: ShardedSamples(folder, fresh, {"weights": "a1"}))
    assert store is None or store.is_older  # which is said, and filled anew


CELLS = st.sampled_from([b"step", b"loss", b"1", b"2", b"0.5", b"nan", b"\x00", b'"', b"\xff", b""])
ROWS = st.lists(CELLS, max_size=4).map(b",".join) | st.binary(max_size=20)


@given(rows=st.lists(ROWS, max_size=6), header=st.booleans())
def test_logs_keep_their_good_lines(place, rows, header):
    path = place / "log.csv"
    path.write_bytes(b"\n".join([b"step,loss", b"1,0.25"] * header + rows) + b"\n")
    answers(lambda: TrainingLog(path, 3, Settings()))
    kept = path.read_text("utf-8").splitlines()
    if header:
        assert kept[:2] == ["step,loss", "1,0.25"]
    for line in kept[1:]:
        step, *figures = line.split(",")
        assert int(step) <= 3
        assert all(isinstance(float(figure), float) for figure in figures)


# Pictures and masks ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def picture_files():
    """A small picture in each format, by its ending."""
    picture = Image.radial_gradient("L").resize((24, 18)).convert("RGB")
    files = {}
    for name, ending in FORMATS.items():
        buffer = io.BytesIO()
        picture.save(buffer, name)
        files[ending] = buffer.getvalue()
    return files


@pytest.mark.parametrize("ending", FORMATS.values())
@given(data=st.data())
def test_pictures_and_masks(picture_files, place, ending, data):
    content = picture_files[ending]
    if data.draw(st.integers(0, 9)):
        content = data.draw(damaged(content, 64))
    (place / f"x.{ending}").write_bytes(content)
    (place / "mask.png").write_bytes(picture_files["png"])
    is_mask = data.draw(st.booleans())
    names = ("mask.png", f"x.{ending}") if is_mask else (f"x.{ending}", "mask.png")
    loaded = answers(lambda: masks.load(Record("a", names[0], mask=names[1], label="cup"), place))
    if loaded:
        image, mask = loaded
        assert (image.mode, mask.mode) == ("RGB", "L")
        assert image.size == mask.size
        assert mask.getbbox()
