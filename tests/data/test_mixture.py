"""Mixtures: each source's share of every batch, its own epochs, its own crops."""

import dataclasses

import numpy as np
import pytest

from muse_jax import data, specs
from muse_jax.data.mixture import MixedOrder, Mixture
from muse_jax.specs import DataSpec

SOURCES = {
    "drawn": {"weight": 3, "name": "scenes"},
    "held": {"weight": 1.0, "name": "scenes", "split": "held_out"},
}
SPEC = DataSpec(name="mixture", image_size=16, text_length=20, vocabulary="scenes", sources=SOURCES)


def which(ids, lengths):
    """Of which source each id is, and its index there."""
    starts = np.cumsum([0, *lengths])
    within = np.asarray(ids) % starts[-1]
    source = np.searchsorted(starts, within, side="right") - 1
    return source, within - starts[source]


def test_every_batch_has_each_sources_share():
    source = data.make_source(SPEC)
    lengths = [len(one) for one in source.sources.values()]
    loader = data.make_loader(SPEC, batch_size=16, seed=0, vocabulary=data.make_vocabulary(SPEC))
    alone = data.make_source(DataSpec(name="scenes", image_size=16, split="held_out"))
    for _ in range(3):
        batch = next(loader)
        found, own = which(batch["example_id"], lengths)
        assert np.bincount(found).tolist() == [12, 4]
        row = int(np.argmax(found))
        np.testing.assert_array_equal(batch["image"][row], alone[int(own[row])]["image"])
    loader.close()


def test_each_source_goes_through_its_own_epochs():
    lengths = [5, 40]
    order = MixedOrder(lengths, [0.5, 0.5], seed=1)
    ids = [order.id(position) for position in range(80)]
    assert len(set(ids)) == len(ids), "ids of different epochs differ"
    source, own = which(ids, lengths)
    small, large = own[source == 0], own[source == 1]
    assert (np.sort(small.reshape(-1, 5), axis=1) == np.arange(5)).all(), "8 epochs of the small one"
    assert sorted(large) == list(range(40)), "and one of the large one"
    assert [MixedOrder(lengths, [0.5, 0.5], seed=1).id(position) for position in (7, 79)] == [ids[7], ids[79]]


class Drawn:
    """Examples that say which seed they were made with."""

    def __init__(self, length):
        self._length = length

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        return self.example(index, (0, index))

    def example(self, index, seed):
        return {"image": np.zeros((1, 1, 3), np.uint8), "text": f"{index} {seed}"}


def test_a_source_has_the_crops_that_it_would_have_alone():
    mixture = Mixture({"a": (1.0, Drawn(4)), "b": (1.0, Drawn(3))})
    # Epoch 2 of the mixture's ids, example 1 of b: as its example 1 in its epoch 2.
    example_id = 2 * 7 + 4 + 1
    assert mixture.example(5, (9, example_id))["text"] == str(1) + " " + str((9, 2 * 3 + 1))


def test_fingerprints_change_with_weights():
    other = {**SOURCES, "held": {**SOURCES["held"], "weight": 2.0}}
    assert data.fingerprint(SPEC) != data.fingerprint(dataclasses.replace(SPEC, sources=other))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sources": {}}, "a mixture has sources"),
        ({"name": "scenes"}, "everything else has none"),
        ({"sources": {"a": {"name": "scenes"}}}, "sources.a.weight is missing"),
        ({"sources": {"a": {"name": "scenes", "weight": 0}}}, "sources.a.weight is 0"),
        ({"sources": {"a": {"name": "scenes", "weight": float("nan")}}}, "sources.a.weight is nan"),
        ({"sources": {**SOURCES, "b": {"name": "scenes", "weight": 1e-320}}}, "weights from 1e-320 to 3"),
        ({"sources": {"a": {"name": "scenes", "weight": -1}}}, "sources.a.weight is -1"),
        ({"sources": {"a": {"name": "scenes", "weight": 1, "pth": "x"}}}, "data.sources.a.pth .*'path'"),
        ({"sources": {"a": {"name": "scenes", "weight": 1, "text_length": 3}}}, "sources.a.text_length"),
        ({"sources": {"a": {"name": "mixture", "weight": 1}}}, "sources.a.name is 'mixture'"),
        ({"sources": {"a": {"name": "sceens", "weight": 1}}}, "sources.a.name is 'sceens'"),
        ({"min_side": 5}, "data.min_side"),
    ],
)
def test_wrong_mixtures_are_named(changes, words):
    with pytest.raises(specs.SpecError, match=words):
        specs._check_data(dataclasses.replace(SPEC, **changes))


@pytest.mark.parametrize("sources", [{}, {"a": {"name": "mixture", "weight": 1}}])
def test_a_source_without_sources_is_refused_wherever_it_is_made(sources):
    with pytest.raises(specs.SpecError, match="mixture"):
        data.make_source(dataclasses.replace(SPEC, sources=sources))


def test_filters_only_where_sizes_are_known():
    with pytest.raises(specs.SpecError, match="min_side .*'array_record'.*'scenes'"):
        specs._check_data(DataSpec(name="scenes", image_size=8, min_side=4))
    specs._check_data(DataSpec(name="folder", image_size=8, min_side=4, max_aspect=2.0))
