"""Samples prepared in 8 bits and by worker processes: the values they had, the same batches."""

import os
import pickle
import shutil
import signal

import numpy as np
import pytest
import torch
from einops import rearrange
from paths import ROOT
from PIL import Image, ImageDraw, ImageFilter

from cat_diffusion.cat_core import preprocess
from cat_diffusion.cat_core.data import masks
from cat_diffusion.cat_core.data.crops import Chance
from cat_diffusion.cat_core.data.manifest import ManifestError, Record
from cat_diffusion.cat_core.pictures.tensors import channels_first
from cat_diffusion.cat_core.training.batches import Batches, Stream, default_workers
from cat_diffusion.cat_core.training.encoding import Preparation, prepare
from cat_diffusion.cat_core.training.settings import TrainingError
from cat_diffusion.cat_core.training.shard_file import About, Shard, save_shard
from cat_diffusion.cat_core.training.shards import ShardedSamples
from cat_diffusion.cat_core.training.stages import CACHE_DTYPES
from cat_diffusion.cat_core.training.stores import FreshSamples
from training import tar_shards

MIDDLE = Chance(0.5, 0.5, 0.5, 0.5)
CPU = torch.device("cpu")
REQUESTS = [(step, range(start, start + 2)) for step in range(3) for start in (0, 2)]


class PlainEncoders:
    """Frozen networks of one number a picture."""

    def image(self, pixels):
        means = pixels.float().mean((1, 2, 3))
        return means.view(-1, 1, 1).expand(-1, 4, 2), means.view(-1, 1)

    def text(self, texts):
        return torch.tensor([[float(len(text))] for text in texts])

    def context(self, texts):
        return self.text(texts).unsqueeze(1).expand(-1, 3, -1)

    def latent(self, image, hole=None):
        levels = preprocess.vae_input_of_levels(image, hole)
        return levels.float().mean((1, 2, 3)).view(-1, 1, 1, 1).expand(-1, 4, 2, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The photograph in several sizes, with its mask; a cut picture."""
    folder = tmp_path_factory.mktemp("pictures")
    photograph = Image.open(ROOT / "web/photograph/photo.jpg").convert("RGB")
    for index, size in enumerate([(512, 512), (640, 480), (300, 700), (97, 61)]):
        photograph.resize(size).save(folder / f"{index}.png")
        mask = Image.new("L", size)
        width, height = size
        draw = ImageDraw.Draw(mask)
        draw.ellipse((width * 0.1, height * 0.2, width * 0.7, height * 0.9), fill=255)
        mask.filter(ImageFilter.BLUR).save(folder / f"{index}_mask.png")
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:500])
    return folder


@pytest.fixture
def records():
    """Seven records: masks, boxes, one without a hole, one that cannot be opened."""
    box = (0.2, 0.3, 0.7, 0.9)
    records = [Record(f"r{i}", f"{i}.png", mask=f"{i}_mask.png", label="cup") for i in range(4)]
    records.append(Record("box", "1.png", box=box, label="cup", caption="a cup"))
    records.append(Record("free", "2.png", caption="a table"))
    records.append(Record("cut", "cut.png", box=box, label="cup"))
    return records


@pytest.fixture
def fresh(folder, records):
    return FreshSamples(records, folder, PlainEncoders(), objective="diffusion", size=64)


def batches(store, workers=0):
    return Batches(store, 4, 0, torch.zeros(1, 3, 1), workers=workers)


def equal(one, other):
    same = [torch.equal(one[key], other[key]) for key in one]
    return one.keys() == other.keys() and all(same)


@pytest.mark.parametrize("size", [512, 64])
@pytest.mark.parametrize("variant", masks.VARIANTS)
def test_samples_in_8_bits_have_the_values_that_floats_gave(folder, records, size, variant):
    for record in records[:-1]:
        prepared = prepare(record, folder, variant, Preparation(size=size), MIDDLE)
        picture, mask = masks.load(record, folder)
        image = channels_first(picture)
        hole = channels_first(masks.training_mask(mask, variant))
        seen = preprocess.clip_input(image, hole)
        assert torch.equal(prepared["whole"], seen.image[0])
        assert torch.equal(prepared["seen"], seen.masked_image[0])
        assert torch.equal(prepared["patch_mask"], seen.patch_mask[0])

        image_at_size = preprocess.resize(image, size, size) / 255
        hole_at_size = preprocess.resize(hole, size, size) / 255
        cells = size // 8
        latent_mask = preprocess.latent_mask(hole_at_size, cells, cells, threshold=0)
        assert torch.equal(prepared["latent_mask"], latent_mask[0])
        for hole_levels, hole_floats in ((None, None), (prepared["hole"][None], hole_at_size)):
            made = preprocess.vae_input_of_levels(prepared["picture"][None], hole_levels)
            assert np.array_equal(made.numpy(), by_numpy(image_at_size, hole_floats))


def by_numpy(image, hole):
    """What CAT's VAE encodes, as the official code computes it."""
    levels = rearrange((image * 255).round().numpy().astype(np.uint8), "b c h w -> b h w c")
    share = 0.0
    if hole is not None:
        grey = (hole * 255).round().numpy().astype(np.uint8)
        share = rearrange(grey, "b c h w -> b h w c") / 255
    return rearrange(levels * (1 - share) / 127.5 - 1, "b h w c -> b c h w")


def test_a_segment_is_dilated_as_pillow_does(folder):
    mask = Image.open(folder / "1_mask.png").resize((512, 512), Image.Resampling.BICUBIC)
    noise = np.random.default_rng(0).integers(0, 256, (512, 512), np.uint8)
    for picture in (mask, Image.fromarray(noise)):
        dilated = masks.training_mask(picture, "segment")
        assert np.array_equal(dilated, picture.filter(ImageFilter.MaxFilter(5)))


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_prepare_the_same_batches(fresh, folder, records, workers):
    alone = [batches(fresh)(*request) for request in REQUESTS]
    other = FreshSamples(records, folder, PlainEncoders(), objective="diffusion", size=64)
    together = list(Stream(batches(other, workers), REQUESTS, CPU))
    assert len(together) == len(REQUESTS)
    assert all(map(equal, alone, together))
    assert other.tally.skipped == fresh.tally.skipped == {"corrupt image": 1}


def test_tar_shards_give_the_batches_of_the_files_in_them(fresh, folder, records, tmp_path):
    for path in folder.iterdir():
        shutil.copy(path, tmp_path)
    packed = list(tar_shards.packed(records, tmp_path, "m", 400_000))
    assert len({record.image.split("/")[0] for record in packed}) > 1
    for path in tmp_path.glob("*.png"):
        path.unlink()
    expected = [batches(fresh)(*request) for request in REQUESTS]
    other = FreshSamples(packed, tmp_path, PlainEncoders(), objective="diffusion", size=64)
    assert all(map(equal, expected, Stream(batches(other, 2), REQUESTS, CPU)))


def test_workers_read_the_same_cache(fresh, tmp_path):
    store = ShardedSamples(tmp_path / "cache", fresh, {})
    store.per_shard = 2
    store.fill()
    alone = [batches(store)(*request) for request in REQUESTS]
    assert all(map(equal, alone, Stream(batches(store, 2), REQUESTS, CPU)))
    fresh_batch = batches(fresh)(*REQUESTS[0])
    for key, value in alone[0].items():
        assert torch.allclose(value, fresh_batch[key].to(value), rtol=1e-3), key


def test_bytes_round_each_column_of_features_by_its_own_measure(tmp_path):
    sizes = torch.tensor([100.0, 1.0, 0.0])
    rng = torch.Generator().manual_seed(0)
    features = (torch.randn(2, 64, 3, generator=rng) * sizes).half()
    rows = {}
    for index in range(2):
        rows["both", index] = {"teacher_patches": features[index], "text": features[index, 0]}
        rows["box", index] = {"patch_mask": torch.ones(1, 4, 4, dtype=torch.uint8)}
    about = About({}, {}, frozenset())
    for dtype in CACHE_DTYPES:
        save_shard(tmp_path / dtype, rows, about, dtype)
    for index in range(2):
        kept = Shard(tmp_path / "fp16").sample(index, "box")
        small = Shard(tmp_path / "int8").sample(index, "box")
        assert kept.keys() == small.keys() == {"teacher_patches", "text", "patch_mask"}
        assert torch.equal(small["text"], kept["text"])
        assert small["teacher_patches"].dtype == torch.float16
        largest = features.float().abs().amax((0, 1))
        error = (small["teacher_patches"].float() - features[index].float()).abs().amax(0)
        # Half a step, and what half precision rounds besides.
        assert (error <= largest * (1 / 254 + 2**-11)).all()
        assert error[0] > 0


def test_what_a_started_worker_gets_needs_no_networks(fresh):
    """Where workers are not forks they get a copy without the frozen networks."""
    samples = pickle.loads(pickle.dumps(batches(fresh).samples))
    assert samples.store.encoders is None
    for request in REQUESTS:
        expected = batches(fresh).samples[request]
        assert samples[request].indices == expected.indices
        assert equal(samples[request].inputs, expected.inputs)


def test_a_worker_that_dies_is_one_sentence(fresh):
    def die(index, variant, chance):
        os.kill(os.getpid(), signal.SIGKILL)

    source = batches(fresh, 1)
    source.samples.store.sample = die
    with pytest.raises(TrainingError, match=r"has died .*dataloader-num-workers 0 shows which"):
        next(Stream(source, REQUESTS, CPU))


def test_what_a_worker_refuses_is_said_as_without_one(folder, records):
    unusable = FreshSamples(records[-1:], folder, PlainEncoders(), objective="diffusion", size=64)
    for workers in (0, 1):
        with pytest.raises(ManifestError, match="Not one record of the manifest can be used"):
            next(Stream(batches(unusable, workers), REQUESTS, CPU))


def test_time_that_is_waited_is_counted():
    def source(step, positions):
        return {"x": torch.zeros(len(positions))}

    stream = Stream(source, REQUESTS, CPU)
    assert len(list(stream)) == len(REQUESTS)
    assert stream.waited > 0
    assert default_workers(1000) == 1
