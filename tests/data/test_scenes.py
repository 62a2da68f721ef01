"""The scenes and their captions: always the same, and always true."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from muse_jax.data import scenes
from muse_jax.text.vocabulary import WordVocabulary, split_words

COUNT = 3000
MADE = {split: scenes.scenes(range(COUNT), split=split) for split in scenes.SPLITS}
EVERY = [item for made in MADE.values() for item in made]
NUMBERS = {"a": 1, "an": 1, "two": 2, "three": 3}


def read_caption(caption: str) -> tuple[str, list[scenes.Group], str | None]:
    """A caption's background, groups and relation, from its words alone."""
    words = [word for word in split_words(caption) if word not in (",", "is", "are", "on", "with", "to", "the", "of")]
    size = {word: size for size, synonyms in scenes.SIZE_WORDS.items() for word in synonyms}
    shape = {**{name: name for name in scenes.SHAPES}, **{many: one for one, many in scenes.PLURALS.items()}}
    relation_words = {p.removeprefix("to the ").split()[0]: r for r, ps in scenes.RELATIONS.items() for p in ps}
    at = words.index("background")
    background = words[at - 1]
    assert words[at - 2] == "a"
    rest = words[: at - 2] + words[at + 1 :]
    groups, relation = [], None
    while rest:
        if rest[0] in relation_words:
            relation = relation_words[rest.pop(0)]
            continue
        count, size_word, color, noun, *rest = rest
        assert (noun in scenes.SHAPES) == (NUMBERS[count] == 1), f"{count} {noun}"
        groups.append(scenes.Group(NUMBERS[count], size[size_word], color, shape[noun]))
    return background, groups, relation


def boxes(item: scenes.Scene, group: int | None = None) -> np.ndarray:
    """[n, (left, top, right, bottom)] of the objects, or of those of one group."""
    chosen = [o for o in item.objects if group is None or o.group == group]
    return np.array(
        [(o.x - o.diameter / 2, o.y - o.diameter / 2, o.x + o.diameter / 2, o.y + o.diameter / 2) for o in chosen]
    )


def test_the_same_index_is_the_same_scene_alone_or_in_a_batch_in_any_process():
    for split in scenes.SPLITS:
        for index in (0, 7, COUNT - 1):
            assert scenes.scene(index, split=split) == MADE[split][index]
    assert scenes.scenes([5, 3], split="test") == [MADE["test"][5], MADE["test"][3]]
    pixels = hashlib.sha256(scenes.render_batch(MADE["train"][:50], 48).tobytes()).hexdigest()
    code = (
        "import hashlib; from muse_jax.data import scenes as s\n"
        "print(hashlib.sha256(s.render_batch(s.scenes(range(50)), 48).tobytes()).hexdigest())\n"
        "print(s.scene(9_999_999).caption)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == [pixels, scenes.scene(9_999_999).caption]


def test_scenes_differ_by_index_seed_and_split():
    for made in MADE.values():
        assert len({item.objects for item in made}) == COUNT
    assert scenes.scene(3, seed=1) != scenes.scene(3)
    seen = [{item.objects for item in made} for made in MADE.values()]
    assert not seen[0] & seen[1]
    with pytest.raises(ValueError, match="'validation'.*held_out"):
        scenes.scene(0, split="validation")


def test_held_out_pairs_are_only_in_their_split():
    def pairs(item: scenes.Scene) -> set[tuple[str, str]]:
        return {(group.color, group.shape) for group in item.groups}

    for split in ("train", "test"):
        assert not any(pairs(item) & set(scenes.HELD_OUT) for item in MADE[split])
        every = {(c, s) for c in scenes.COLORS for s in scenes.SHAPES} - set(scenes.HELD_OUT)
        assert set().union(*map(pairs, MADE[split])) == every
    assert all(pairs(item) & set(scenes.HELD_OUT) for item in MADE["held_out"])
    # Each held-out colour and shape is seen in training, only not together.
    assert {c for c, _ in scenes.HELD_OUT} <= {g.color for item in MADE["train"] for g in item.groups}
    assert {s for _, s in scenes.HELD_OUT} <= {g.shape for item in MADE["train"] for g in item.groups}


def test_captions_say_what_is_there():
    for item in EVERY:
        assert read_caption(item.caption) == (item.background, list(item.groups), item.relation), item.caption
        for number, group in enumerate(item.groups):
            assert sum(thing.group == number for thing in item.objects) == group.count


def test_relations_hold_for_every_pair_of_objects():
    for item in EVERY:
        assert (item.relation is None) == (len(item.groups) == 1)
        if item.relation is None:
            continue
        first, second = boxes(item, 0), boxes(item, 1)
        axis = 0 if item.relation in ("left", "right") else 1
        if item.relation in ("right", "below"):
            first, second = second, first
        assert first[:, axis + 2].max() < second[:, axis].min(), item.caption  # far edges before near edges


def test_sizes_are_apart_and_objects_lie_within_the_picture_without_touching():
    assert scenes.SIZES["small"][1] + 0.05 < scenes.SIZES["large"][0]
    for item in EVERY:
        for thing in item.objects:
            low, high = scenes.SIZES[item.groups[thing.group].size]
            assert low <= thing.diameter <= high
        box = boxes(item)
        assert box.min() > 0
        assert box.max() < 1
        for i in range(len(box)):
            for j in range(i):
                apart = max(*(box[i, :2] - box[j, 2:]), *(box[j, :2] - box[i, 2:]))
                assert apart > 0.02, item.caption


def test_two_groups_of_a_scene_can_be_told_apart():
    for item in EVERY:
        assert 1 <= len(item.objects) <= 3
        if len(item.groups) == 2:
            one, two = item.groups
            assert (one.color, one.shape) != (two.color, two.shape)


def test_the_scenes_are_varied():
    items = MADE["train"]
    counts = [len(item.objects) for item in items]
    assert all(counts.count(n) > COUNT / 6 for n in (1, 2, 3))
    for background in scenes.BACKGROUNDS:
        assert sum(item.background == background for item in items) > COUNT / 6
    for relation in scenes.RELATIONS:
        assert sum(item.relation == relation for item in items) > COUNT / 12
    x = np.array([item.objects[0].x for item in items if len(item.objects) == 1])
    assert x.std() > 0.05  # positions are jittered
    same = [item.caption for item in items if item.groups == (scenes.Group(1, "large", "red", "circle"),)]
    assert len({caption.split("red")[0] for caption in same}) > 3  # wording varies


def test_every_word_is_in_the_vocabulary_and_the_other_way_round():
    words = WordVocabulary(scenes.WORDS)
    assert not any(words.unknown(item.caption) for item in EVERY)
    used = {word for item in EVERY for word in split_words(item.caption)}
    assert set(scenes.WORDS) - used <= {"an"}  # prompts may say "an orange circle"
    assert max(len(split_words(item.caption)) for item in EVERY) <= 24


@pytest.mark.parametrize("size", [8, 31, 32, 64, 256])
def test_any_resolution_shows_the_same_scene(size):
    items = MADE["train"][:12] + MADE["held_out"][:12]
    pictures = scenes.render_batch(items, size)
    assert pictures.shape == (24, size, size, 3)
    assert pictures.dtype == np.uint8
    for item, picture in zip(items, pictures, strict=True):
        np.testing.assert_array_equal(picture, scenes.render(item, size))
        assert picture[0, 0].tolist() == list(scenes.BACKGROUNDS[item.background])
        for thing in item.objects if size > 8 else ():  # the centre of every shape is filled
            at = picture[int(thing.y * size), int(thing.x * size)]
            color = np.array(scenes.COLORS[item.groups[thing.group].color])
            assert np.abs(at - color).max() <= 2, item.caption


def test_pictures_of_two_resolutions_agree():
    items = MADE["test"][:20]
    large = scenes.render_batch(items, 256).astype(np.float32)
    small = scenes.render_batch(items, 64).astype(np.float32)
    shrunk = large.reshape(20, 64, 4, 64, 4, 3).mean((2, 4))
    assert np.abs(shrunk - small).mean() < 0.6
    assert np.abs(shrunk - small).max() < 80  # sharp corners, at most


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_shapes_fill_the_share_of_their_box_that_they_should(shape):
    share = {"circle": np.pi / 4, "square": 1, "triangle": 1 / 2, "cross": 5 / 9}[shape]
    group = scenes.Group(1, "large", "red", shape)
    item = scenes.Scene("black", (group,), None, (scenes.SceneObject(0, 0.45, 0.55, 0.3),), "")
    picture = scenes.render(item, 128).astype(np.float32)
    back, front = (np.array(c, np.float32) for c in (scenes.BACKGROUNDS["black"], scenes.COLORS["red"]))
    cover = (picture[..., 0] - back[0]) / (front[0] - back[0])
    assert abs(cover.sum() / (0.3 * 128) ** 2 - share) < 0.02
    y, x = np.mgrid[:128, :128] + 0.5
    bounds = (cover > 0.5).nonzero()
    assert abs((bounds[1].min() + bounds[1].max() + 1) / 2 - 0.45 * 128) < 1
    assert abs((bounds[0].min() + bounds[0].max() + 1) / 2 - 0.55 * 128) < 1
    assert np.ptp(bounds[1]) + 1 == pytest.approx(0.3 * 128, abs=2)


def test_edges_are_antialiased():
    item = scenes.Scene(
        "black", (scenes.Group(1, "large", "red", "circle"),), None, (scenes.SceneObject(0, 0.5, 0.5, 0.32),), ""
    )
    red = scenes.render(item, 64)[..., 0]
    between = (red > 30) & (red < 200)
    assert 20 < between.sum() < 120  # a rim one pixel wide
    moved = scenes.Scene(item.background, item.groups, None, (scenes.SceneObject(0, 0.504, 0.5, 0.32),), "")
    assert (scenes.render(moved, 64) != scenes.render(item, 64)).any()  # a quarter of a pixel shows
