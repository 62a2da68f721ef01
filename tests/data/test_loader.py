"""What a run sees is a function of the seed and the step: however it is stopped, sharded or sped up."""

import itertools
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from muse_jax import data
from muse_jax.data import processes
from muse_jax.data.loader import Batches, Loader, Order
from muse_jax.specs import DataSpec
from muse_jax.text.vocabulary import ByteVocabulary

SCENES = DataSpec(name="scenes", image_size=16, text_length=20)


class Numbers:
    """A source whose pictures say which example they are, and with which seed they were made."""

    def __init__(self, length: int):
        self._length = length

    def __len__(self) -> int:
        return self._length

    def example(self, index: int, seed: tuple[int, ...]) -> dict:
        time.sleep(0.0002 * (index % 3))  # so that threads overtake each other
        return {"image": np.full((1, 1, 3), index % 256, np.uint8), "label": hash(seed) % 1000}


def loader_of(length: int = 10, start_step: int = 0, prefetch: int = 2, **options) -> Loader:
    options = {"batch_size": 4, "seed": 0, **options}
    return Loader(Batches(Numbers(length), **options), start_step=start_step, prefetch=prefetch)


def take(loader: Loader, count: int) -> list[dict]:
    batches = list(itertools.islice(loader, count))
    loader.close()
    return batches


def equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], other[key])
        assert one[key].dtype == other[key].dtype


def scenes_loader(**options) -> Loader:
    spec = options.pop("spec", SCENES)
    vocabulary = data.make_vocabulary(spec)
    return data.make_loader(spec, **{"batch_size": 8, "seed": 1, "vocabulary": vocabulary, **options})


def test_a_batch_has_what_the_networks_expect():
    (batch,) = take(scenes_loader(), 1)
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "example_id": ((8,), "int32"),
        "image": ((8, 16, 16, 3), "uint8"),
        "text_ids": ((8, 20), "int32"),
        "text_mask": ((8, 20), "bool"),
    }
    source = data.make_source(SCENES)
    vocabulary = data.make_vocabulary(SCENES)
    for row, example_id in enumerate(batch["example_id"]):  # text, picture and id belong together
        example = source[int(example_id) % len(source)]
        np.testing.assert_array_equal(batch["image"][row], example["image"])
        assert vocabulary.decode(batch["text_ids"][row]) == example["text"].replace(",", " ,")


def test_every_epoch_has_every_example_once_in_another_order():
    ids = np.concatenate([batch["example_id"] for batch in take(loader_of(10), 15)])  # 6 epochs of 10, batches across
    epochs = ids.reshape(6, 10)
    for number, epoch in enumerate(epochs):
        assert sorted(epoch % 10) == list(range(10))
        assert (epoch // 10 == number).all()  # ids of two epochs differ
    assert len({tuple(epoch % 10) for epoch in epochs}) == 6


@pytest.mark.parametrize("length", [1, 2, 1000, 2**14 - 1, 2**14, 20_001])
def test_orders_of_every_length_are_whole(length):
    order = Order(length, seed=5)
    epochs = [[order[p] for p in range(e * length, (e + 1) * length)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(length))
    if length > 2:
        assert epochs[0] != epochs[1]
        assert epochs[0][:5] == [Order(length, seed=5)[p] for p in range(5)]
        assert epochs[0][:5] != [Order(length, seed=6)[p] for p in range(5)]
    assert order[10**9 * length] in range(length)


def test_the_order_is_shuffled_well():
    batches = take(loader_of(1000, batch_size=100), 10)
    first = batches[0]["example_id"]
    assert 350 < first.mean() < 650
    assert np.abs(np.diff(first)).mean() > 200
    other = take(loader_of(1000, batch_size=100, seed=1), 1)[0]["example_id"]
    assert len(set(first) & set(other)) < 40
    held = take(loader_of(1000, batch_size=100, split="eval"), 1)[0]["example_id"]
    assert len(set(first) & set(held)) < 40


@pytest.mark.parametrize("start", [1, 3, 7])
def test_a_restart_sees_what_the_whole_run_would_have_seen(start):
    whole = take(loader_of(10), 10)
    for one, other in zip(whole[start:], take(loader_of(10, start_step=start), 10 - start), strict=True):
        equal(one, other)
    loader = loader_of(10, start_step=start)
    equal(loader.batches[5], whole[5])  # and by number
    next(loader)
    assert loader.step == start + 1
    loader.close()


def test_skipped_batches_are_never_seen_and_those_after_them_move_up():
    """A leap of the loss at batch 4: whatever step the run goes on from, it sees the same."""
    every = take(scenes_loader(), 9)
    skipped = ((4, 6), (7, 8))
    for start in range(4):
        found = take(scenes_loader(start_step=start, skip_batches=skipped), 6 - start)
        for one, other in zip(found, [every[i] for i in (0, 1, 2, 3, 6, 8)][start:], strict=True):
            equal(one, other)


def test_the_same_with_more_threads_or_none():
    whole = take(loader_of(10, prefetch=2), 6)
    for prefetch in (0, 1, 8):
        for one, other in zip(whole, take(loader_of(10, prefetch=prefetch), 6), strict=True):
            equal(one, other)


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_processes_share_a_batch_and_each_makes_its_rows(processes):
    whole = take(loader_of(13, batch_size=8), 4)
    parts = [take(loader_of(13, batch_size=8, process_index=i, process_count=processes), 4) for i in range(processes)]
    for step, expected in enumerate(whole):
        joined = {key: np.concatenate([part[step][key] for part in parts]) for key in expected}
        equal(joined, expected)


def test_processes_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ValueError, match="8 does not divide into 3 processes"):
        loader_of(batch_size=8, process_count=3)


def test_a_source_smaller_than_the_batch_repeats_with_ids_of_their_own():
    (batch,) = take(loader_of(3, batch_size=12), 1)
    assert sorted(batch["example_id"]) == list(range(12))
    assert sorted(batch["image"][:, 0, 0, 0]) == [0] * 4 + [1] * 4 + [2] * 4
    assert len(set(batch["label"].tolist())) > 3  # their crops differ too


def test_ids_stay_in_32_bits():
    loader = loader_of(10, start_step=2**36)
    (batch,) = take(loader, 1)
    assert batch["example_id"].dtype == np.int32
    assert (batch["example_id"] >= 0).all()
    ids = loader.batches.ids(2**36)
    order = loader.batches._order
    assert [i % 10 for i in ids] == [order[position] for position in range(2**38, 2**38 + 4)]


def test_pictures_of_a_folder_are_cropped_anew_in_every_epoch(tmp_path):
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 256, (8, 64, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"picture {i}")
    spec = DataSpec(name="folder", path=str(tmp_path), image_size=8, text_length=4, crop="random")
    vocabulary = data.make_vocabulary(spec)
    assert {"picture", "0"} & set(vocabulary.words)
    length = len(data.make_source(spec))

    def epochs(seed: int) -> list[dict]:
        return take(data.make_loader(spec, batch_size=length, seed=seed, vocabulary=vocabulary), 6)

    seen = epochs(0)
    for one, other in zip(seen, epochs(0), strict=True):
        equal(one, other)
    crops = {picture.tobytes() for batch in seen for picture in batch["image"]}
    assert len(crops) == 6 * length
    assert epochs(1)[0]["image"].tobytes() != seen[0]["image"].tobytes()


def test_text_that_cannot_be_had_is_said_at_once(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="no vocabulary"):
        data.make_loader(SCENES, batch_size=2, seed=0)
    with pytest.raises(ValueError, match="'train' or 'eval'"):
        data.make_loader(SCENES, batch_size=2, seed=0, split="test")
    folder = DataSpec(name="folder", path=str(tmp_path), image_size=8, text_length=4)
    with pytest.raises(ValueError, match="no caption"):
        data.make_loader(folder, batch_size=1, seed=0, vocabulary=ByteVocabulary())


def test_scenes_refuse_what_would_make_their_captions_wrong():
    with pytest.raises(ValueError, match="left and right"):
        data.make_source(DataSpec(name="scenes", image_size=16, flip=True))
    with pytest.raises(ValueError, match="'validation'.*'held_out'"):
        data.make_source(DataSpec(name="scenes", image_size=16, eval_split="validation"), "eval")


def test_train_and_evaluation_scenes_differ():
    train, held = (take(scenes_loader(split=split), 1)[0] for split in ("train", "eval"))
    assert train["image"].tobytes() != held["image"].tobytes()
    assert len(data.make_source(SCENES, "eval")) < len(data.make_source(SCENES))


def test_orders_of_long_lengths_cost_little_more_a_place():
    def seconds(length):
        order, places = Order(length, seed=5), range(2 * length)
        start = time.process_time()
        for place in places:
            order[place]
        return (time.process_time() - start) / len(places)

    short = min(seconds(1000) for _ in range(5))
    for length in (2**14 - 1, 2**14, 20_001):
        assert min(seconds(length) for _ in range(3)) < 100 * short


def test_synthetic_batches_are_full_and_free():
    spec = DataSpec(name="synthetic", image_size=32, text_length=12)
    loader = data.make_loader(spec, batch_size=64, seed=0, vocabulary=data.make_vocabulary(spec))
    first = next(loader)
    assert first["image"].shape == (64, 32, 32, 3)
    assert first["text_mask"].all()
    assert len({tuple(row) for row in first["text_ids"].tolist()}) > 20
    assert first["label"].max() < 1000
    equal(first, take(data.make_loader(spec, batch_size=64, seed=0, vocabulary=ByteVocabulary()), 1)[0])

    def seconds(batches):
        start = time.process_time()
        take(batches, 20)
        return time.process_time() - start

    drawn = DataSpec(name="scenes", image_size=32, text_length=12, vocabulary="scenes")
    scenes_loader = data.make_loader(drawn, batch_size=64, seed=0, vocabulary=data.make_vocabulary(drawn))
    next(scenes_loader)
    assert seconds(loader) < 0.5 * seconds(scenes_loader)


def test_vocabularies_by_name():
    assert data.make_vocabulary(DataSpec(name="scenes", image_size=16)) is None  # no text in the batch
    words = data.make_vocabulary(SCENES)
    assert words.unknown("on a gray background, three little purple crosses to the left of an orange circle") == []
    assert data.make_vocabulary(DataSpec(name="scenes", image_size=16, text_length=4, vocabulary="bytes")).size == 259
    with pytest.raises(FileNotFoundError, match="'sceens'"):
        data.make_vocabulary(DataSpec(name="scenes", image_size=16, text_length=4, vocabulary="sceens"))


def test_fingerprints_name_the_data():
    assert data.fingerprint(SCENES) == data.fingerprint(DataSpec(name="scenes", image_size=64))
    assert data.fingerprint(SCENES) != data.fingerprint(DataSpec(name="scenes", image_size=16, split="held_out"))
    assert data.fingerprint(DataSpec(name="synthetic", image_size=8)) == "synthetic"
    with pytest.raises(ValueError, match="'senes'"):
        data.fingerprint(DataSpec(name="senes", image_size=16))


def _children(process: int | str = "self") -> set[int]:
    """Of all its threads, since each of them may start processes."""
    lists = pathlib.Path(f"/proc/{process}/task").glob("*/children")
    return {int(child) for children in lists for child in children.read_text().split()}


def _loading(before: set[int]) -> set[int]:
    commands = {child: pathlib.Path(f"/proc/{child}/cmdline").read_bytes() for child in _children() - before}
    return {child for child, command in commands.items() if b"resource_tracker" not in command}


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["killed", "stopped", "gone with exit code 0"])
def test_loading_processes_give_the_same_batches_and_may_fail(trouble, monkeypatch):
    spec = DataSpec(name="scenes", image_size=16, text_length=20, workers=2)
    expected = take(scenes_loader(), 30)
    before = _children()
    if trouble == "gone with exit code 0":  # SIGTERM ends them so
        monkeypatch.setattr(processes, "_started", _started_and_ends_well)
        monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[2])  # where loading processes look for this module
    loader = scenes_loader(spec=spec)
    for step in range(5):
        equal(next(loader), expected[step])
    number = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}.get(trouble, signal.SIGTERM)
    os.kill(min(_loading(before)), number)
    began = time.monotonic()
    for step in range(5, 30):
        equal(next(loader), expected[step])
    assert time.monotonic() - began < 120
    loader.close()
    assert not _loading(before)


def _started_and_ends_well(*args):
    """In a loading process, where `_started` is the original."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    processes._started(*args)


@pytest.mark.slow
def test_loading_processes_end_with_a_run_that_was_killed():
    program = (
        "from muse_jax import data; from muse_jax.specs import DataSpec\n"
        "if __name__ == '__main__':\n"
        "    spec = DataSpec(name='scenes', image_size=16, workers=2)\n"
        "    loader = data.make_loader(spec, batch_size=4, seed=0)\n"
        "    next(loader); print('loaded', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout.readline() == "loaded\n"
        loading = _children(run.pid)
        assert len(loading) >= 2
        run.kill()
    deadline = time.monotonic() + 60
    while any(pathlib.Path(f"/proc/{child}").exists() for child in loading):
        assert time.monotonic() < deadline, loading
        time.sleep(0.1)
