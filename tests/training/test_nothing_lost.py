"""What a run and a cache refuse, and what they save: in one process, on a few numbers.

tests/training/test_train.py runs the command itself.
"""

import dataclasses
import json
import re

import pytest
import torch
from PIL import Image, ImageDraw
from plain_objective import PlainObjective
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cat_diffusion.cat_core.data.manifest import ManifestError, Record
from cat_diffusion.cat_core.files import locked
from cat_diffusion.cat_core.models.sem_inpainter import SemInpainter
from cat_diffusion.cat_core.training import checkpoints, identity, loop, shards
from cat_diffusion.cat_core.training.batches import Batches
from cat_diffusion.cat_core.training.log import TrainingLog
from cat_diffusion.cat_core.training.processes import Alone
from cat_diffusion.cat_core.training.settings import Settings, TrainingError, TrainingRun
from cat_diffusion.cat_core.training.shards import ShardedSamples
from cat_diffusion.cat_core.training.stages import STAGES
from cat_diffusion.cat_core.training.stores import FreshSamples
from cat_diffusion.cat_core.weights import Checkpoint

pytest.importorskip("accelerate")

FACTS = {"masked": False, "labels": "a1", "weights of clip_vision": "b2"}
FIGURES = {"loss": 0.5, "images_per_second": 1.0}
ENCODERS = {"weights of clip_text": "a1", "weights of clip_vision": "b2"}


def source(step, positions):
    return {"target": torch.full((len(positions),), float(step))}


@pytest.fixture
def make_run(tiny, tmp_path):
    """A run of stage 1 on a tiny SemInpainter; two steps, a checkpoint after each."""

    def make_run(name="run", stage=STAGES["sem-inpainter"], facts=FACTS, **changes):
        _, architecture = tiny
        torch.manual_seed(0)
        module = SemInpainter(architecture.sem_inpainter)
        return TrainingRun(
            stage,
            {"sem_inpainter": module},
            PlainObjective(module),
            Settings(
                **{"steps": 2, "batch_size": 1, "micro_batch_size": 1, "save_every": 1} | changes
            ),
            folder=tmp_path / name,
            identity=facts,
            architecture=architecture,
            provenance="x",
            licence="x",
        )

    return make_run


def train(run):
    return loop.train(run, source, cpu=True)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# A run's identity ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "facts, words",
    [
        ({"masked": True}, "masked was False, is True"),
        ({"labels": "c3"}, "labels was a1, is c3"),
        ({"weights of clip_vision": "c3"}, "weights of clip_vision was b2, is c3"),
    ],
)
def test_a_run_of_other_facts_is_not_continued(make_run, facts, words):
    train(make_run())
    with pytest.raises(TrainingError, match=words):
        train(make_run(facts=FACTS | facts, steps=3))
    with pytest.raises(TrainingError, match=words):
        checkpoints.refuse_another_run(make_run(facts=FACTS | facts, steps=3))


def test_other_rates_and_fewer_steps_are_named(make_run):
    train(make_run())
    with pytest.raises(TrainingError, match=r"rate of sem_inpainter was 0.0001, is 0.0002"):
        train(make_run(stage=STAGES["sem-inpainter"].scaled(2)))
    with pytest.raises(TrainingError, match="a run of 2 steps, more than the 1 that are asked for"):
        train(make_run(steps=1))
    assert train(make_run()).parent.name == "checkpoint-00000002"  # nothing to do


def test_a_checkpoint_of_an_older_version_is_continued_with_a_sentence(make_run, capsys):
    train(make_run())
    path = make_run().folder / "checkpoint-00000002/state.pt"
    state = torch.load(path)
    del state["identity"], state["weights"]
    torch.save(state, path)
    train(make_run(steps=3))
    assert "checkpoint-00000002 is of an older version" in capsys.readouterr().out


def test_facts_follow_from_contents(tiny, tmp_path):
    parts, architecture = tiny
    file = Checkpoint(tmp_path / "x", parts, architecture)
    before = identity.of_parts(file, ["clip_vision"])
    assert before == identity.of_parts(file, ["clip_vision"])
    moved = {key: tensor.clone() for key, tensor in parts["clip_vision"].items()}
    next(iter(moved.values())).view(-1)[0] += 1
    changed = dataclasses.replace(file, parts={**parts, "clip_vision": moved})
    assert before != identity.of_parts(changed, ["clip_vision"])

    records = [Record("a", "a.png", mask="m.png", label="cup"), Record("b", "b.png", caption="x")]
    facts = identity.of_records(records)
    for changed, name in (
        (dataclasses.replace(records[0], label="spoon"), "labels"),
        (dataclasses.replace(records[0], caption="a cup"), "captions"),
        (dataclasses.replace(records[0], mask="n.png"), "holes"),
        (dataclasses.replace(records[0], image="c.png"), "names of pictures"),
    ):
        (difference,) = identity.differences(facts, identity.of_records([changed, records[1]]))
        assert difference.startswith(f"{name} was ")
    assert "number of records was 2, is 1" in identity.differences(
        facts, identity.of_records(records[:1])
    )
    before = identity.of_sizes(records, tmp_path)
    (tmp_path / "m.png").write_text("x")
    assert before != identity.of_sizes(records, tmp_path)


# Damaged checkpoints ------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["state.pt", "weights.safetensors"])
@pytest.mark.parametrize(
    "damage", [cut, empty, flip, type(None)], ids=lambda damage: damage.__name__
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_continued(make_run, capsys, name, damage):
    whole = load_file(train(make_run("whole", steps=3)))
    train(make_run())
    folder = make_run().folder
    path = folder / "checkpoint-00000002" / name
    if damage is type(None):
        path.unlink()
    else:
        damage(path)
    result = train(make_run(steps=3))
    tensors = load_file(result)
    assert tensors.keys() == whole.keys()
    assert all(torch.equal(tensors[key], whole[key]) for key in whole)
    output = capsys.readouterr().out
    assert "checkpoint-00000002 is damaged (" in output
    assert "goes on from step 1" in output
    expected = ["checkpoint-00000002", "checkpoint-00000003", "damaged-00000002", "lock", "log.csv"]
    assert names(folder) == expected


def test_a_folder_without_a_whole_checkpoint_is_refused(make_run):
    train(make_run())
    for path in make_run().folder.glob("checkpoint-*/state.pt"):
        path.write_bytes(b"")
    words = "No checkpoint in .* is whole: checkpoint-00000002 is damaged .*checkpoint-00000001"
    with pytest.raises(TrainingError, match=words):
        train(make_run(steps=3))


def test_a_folder_in_which_another_process_trains_is_refused(make_run):
    folder = make_run().folder
    with locked(folder), pytest.raises(TrainingError, match="Another process trains in"):
        train(make_run())
    assert names(folder) == ["lock"]


# The log ------------------------------------------------------------------------------------------


def test_damaged_lines_leave_the_log_and_good_ones_stay(tmp_path):
    path = tmp_path / "log.csv"
    lines = [b"step,loss", b"1,0.5", b"\xff\x00\x80,,", b"2,0.25", b'3,0.1"', b"4,0.2", b"3,0.1"]
    path.write_bytes(b"\r\n".join(lines))
    TrainingLog(path, 3, Settings()).add(4, FIGURES | {"loss": 0.125})
    assert path.read_text().splitlines() == ["step,loss", "1,0.5", "2,0.25", "4,0.125"]


def test_a_log_without_its_first_line_is_kept_beside_a_new_one(tmp_path, capsys):
    path = tmp_path / "log.csv"
    path.write_bytes(b"\x00\x01\n1,0.5\n")
    TrainingLog(path, 1, Settings()).add(2, FIGURES)
    assert path.read_text().splitlines() == ["step,loss,images_per_second", "2,0.5,1.0"]
    assert (tmp_path / "damaged-log.csv").read_bytes() == b"\x00\x01\n1,0.5\n"
    assert "kept as damaged-log.csv" in capsys.readouterr().out


def test_a_log_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "log.csv").mkdir()
    with pytest.raises(TrainingError, match=r"Cannot write .*log.csv.*continues from there"):
        TrainingLog(tmp_path / "log.csv", 0, Settings())


# The cache ----------------------------------------------------------------------------------------


class PlainEncoders:
    """Frozen networks of one number a picture, small enough to be known by heart."""

    scale = 1.0

    def image(self, pixels):
        means = pixels.float().mean((1, 2, 3)).mul(self.scale)
        return means.view(-1, 1, 1).expand(-1, 4, 2), means.view(-1, 1)

    def text(self, texts):
        return torch.tensor([[float(len(text))] for text in texts])


@pytest.fixture
def make_cache(tmp_path):
    """A cache of two records, filled."""
    records = []
    for index in range(2):
        Image.new("RGB", (32, 32), (50 + index, 100, 200)).save(tmp_path / f"{index}.png")
        mask = Image.new("L", (32, 32))
        ImageDraw.Draw(mask).ellipse((4, 4, 24 - index, 24), fill=255)
        mask.save(tmp_path / f"{index}_mask.png")
        records.append(Record(f"r{index}", f"{index}.png", mask=f"{index}_mask.png", label="cup"))

    def make_cache(
        changed=None, encoders=ENCODERS, networks=None, folder="cache", fill=True, reads=None
    ):
        chosen = [changed, records[1]] if changed else records
        networks = networks or PlainEncoders()
        fresh = FreshSamples(chosen, tmp_path, networks, objective="distillation", reads=reads)
        store = ShardedSamples(tmp_path / folder, fresh, encoders)
        if fill:
            store.fill()
        return store

    make_cache.records = records
    make_cache.shard = tmp_path / "cache/shard-000000.safetensors"
    return make_cache


def test_a_cache_of_other_networks_is_refused(make_cache):
    make_cache()
    make_cache()
    with pytest.raises(ManifestError, match="weights of clip_vision was b2, is c3"):
        make_cache(encoders=ENCODERS | {"weights of clip_vision": "c3"})


def teacher_images(store):
    return [store.sample(index, "box")["teacher_image"].item() for index in range(2)]


def marked(path):
    """Let a cache say that all its samples hold sevens: what is encoded again does not."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["both.teacher_image"].fill_(7)
    save_file(tensors, path, metadata)


def test_only_records_that_have_changed_are_encoded_again(make_cache, capsys, tmp_path):
    """Labels, masks and pictures; a copy of a file is no change, nor is one that has gone."""
    first, second = teacher_images(make_cache())
    marked(make_cache.shard)
    spoon = dataclasses.replace(make_cache.records[0], label="spoon")
    store = make_cache(spoon)
    words = r"cache: 1 records are encoded again, whose .* words have changed since: r0\."
    assert re.search(words, capsys.readouterr().out)
    assert teacher_images(store) == [first, 7]
    assert store.sample(0, "segment")["text"].item() == len("spoon")

    marked(make_cache.shard)
    mask = tmp_path / "1_mask.png"
    mask.write_bytes(mask.read_bytes())  # another time, the same content
    (tmp_path / "0.png").unlink()  # pictures are not needed any more
    assert teacher_images(make_cache(spoon)) == [7, 7]
    assert capsys.readouterr().out == ""
    Image.new("L", (32, 32), 255).save(mask)
    assert teacher_images(make_cache(spoon)) == [7, second]
    assert "have changed since: r1." in capsys.readouterr().out


def test_what_another_stage_reads_is_added(make_cache, capsys):
    few = frozenset({"patches", "patch_mask"})
    store = make_cache(reads=few)
    assert set(store.sample(0, "box")) == few
    small = make_cache.shard.stat().st_size
    whole = make_cache(folder="whole")
    store = make_cache()
    assert re.search("2 records it lacks image, teacher_image, teacher", capsys.readouterr().out)
    assert make_cache.shard.stat().st_size > small
    for index in range(2):
        for variant in ("segment", "box"):
            sample = store.sample(index, variant)
            expected = whole.sample(index, variant)
            assert sample.keys() == expected.keys() == STAGES["sem-inpainter"].reads
            assert all(torch.equal(sample[key], expected[key]) for key in sample)
    before = make_cache.shard.read_bytes()
    assert set(make_cache(reads=few).sample(0, "box")) == few
    assert make_cache.shard.read_bytes() == before


def test_a_file_that_is_lacking_when_more_is_encoded_may_come_back(make_cache, tmp_path):
    few = frozenset({"patches", "patch_mask"})
    make_cache(reads=few)
    picture = (tmp_path / "1.png").rename(tmp_path / "hidden.png")
    store = make_cache()
    assert store.sample(0, "box") is not None
    assert store.sample(1, "box") is None
    picture.rename(tmp_path / "1.png")
    assert set(make_cache().sample(1, "box")) == STAGES["sem-inpainter"].reads


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "[" * 100_000])
def test_a_cache_whose_facts_are_damaged_is_refused(make_cache, text):
    make_cache()
    (make_cache.shard.parent / "cache.json").write_text(text)
    with pytest.raises(ManifestError, match=r"cache.json cannot be read .*delete this one"):
        make_cache()


@pytest.mark.parametrize("version", [{}, {"version": 3, "weights of clip_text": "a1"}])
def test_a_cache_of_an_older_version_is_filled_again_with_a_sentence(make_cache, capsys, version):
    expected = teacher_images(make_cache())
    marked(make_cache.shard)
    tensors = load_file(make_cache.shard)
    save_file(tensors, make_cache.shard, {"files": "{}"})
    facts = {"objective": "distillation", "size": 512, "cell": 8, "records": "f"} | version
    (make_cache.shard.parent / "cache.json").write_text(json.dumps(facts))
    assert teacher_images(make_cache()) == expected
    output = capsys.readouterr().out
    assert "was filled by an older version; its records are encoded again" in output
    make_cache()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("damage", [cut, empty], ids=lambda damage: damage.__name__)
def test_a_damaged_shard_is_encoded_again(make_cache, capsys, damage):
    make_cache()
    before = make_cache.shard.read_bytes()
    damage(make_cache.shard)
    store = make_cache()
    assert re.search(r"shard-000000.* is damaged .*encoded again", capsys.readouterr().out)
    assert make_cache.shard.read_bytes() == before
    damage(make_cache.shard)
    store.shards.clear()
    with pytest.raises(TrainingError, match=r"cannot be read .*Start the same command again"):
        store.sample(0, "box")


def test_processes_fill_a_cache_together_each_its_share(make_cache):
    store = make_cache(fill=False)
    store.per_shard = 1
    second = []
    store.fill(lambda: second.append(names(store.folder)), Alone(2, process_index=1))
    assert second == [["shard-000001.safetensors"]]
    store.fill(processes=Alone(2, process_index=0))
    shards = ["shard-000000.safetensors", "shard-000001.safetensors"]
    assert names(store.folder) == ["cache.json", "lock", *shards]
    whole = make_cache(folder="whole")
    for index in range(2):
        for variant in ("segment", "box"):
            sample = store.sample(index, variant)
            expected = whole.sample(index, variant)
            assert sample.keys() == expected.keys()
            for key, value in sample.items():
                assert torch.equal(value, expected[key])


def test_few_shards_are_open_at_a_time(make_cache, monkeypatch):
    monkeypatch.setattr(shards, "MOST_OPEN", 1)
    store = make_cache(fill=False)
    store.per_shard = 1
    store.fill()
    first = store.sample(0, "box")
    kept = first["teacher_image"].clone()
    store.sample(1, "box")
    assert list(store.shards) == [1]
    assert torch.equal(first["teacher_image"], kept)


def test_a_sample_that_is_no_number_is_named(make_cache):
    make_cache()
    with safe_open(make_cache.shard, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(make_cache.shard)
    tensors["both.teacher_image"][1] = float("nan")
    save_file(tensors, make_cache.shard, metadata)
    store = make_cache()
    words = r"teacher_image of record r1 holds NaN or Inf. It lies in .*shard-000000.*delete"
    with pytest.raises(TrainingError, match=words):
        Batches(store, 2, 0)(0, range(2))


def test_networks_that_give_no_numbers_fill_no_cache(make_cache):
    networks = PlainEncoders()
    networks.scale = float("nan")
    words = "of record r0 holds NaN or Inf.*frozen networks .* made it of 0.png"
    with pytest.raises(TrainingError, match=words):
        make_cache(networks=networks)
    assert not make_cache.shard.exists()


def test_a_cache_that_another_process_fills_is_refused(make_cache):
    make_cache()
    with locked(make_cache.shard.parent), pytest.raises(TrainingError, match="fills the cache"):
        make_cache()


def test_shards_may_be_read_by_others(make_cache, tmp_path):
    make_cache()
    (tmp_path / "other").touch()
    assert make_cache.shard.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_cache_in_a_place_that_takes_no_files_is_one_sentence(make_cache):
    make_cache.shard.parent.write_text("a file")
    with pytest.raises(TrainingError, match=r"Cannot write to the cache .*give another"):
        make_cache()
