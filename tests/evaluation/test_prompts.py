"""Captions taken apart, and pictures held against them: the truth comes from the scenes' structures."""

import dataclasses
import itertools

import numpy as np
import pytest

from muse_jax.data import scenes
from muse_jax.evaluation import prompts, reader


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_every_wording_of_the_generator_is_parsed(split):
    for item in scenes.scenes(range(1500), seed=2, split=split):
        groups = tuple(prompts.ClaimedGroup(g.count, g.size, g.color, g.shape) for g in item.groups)
        assert prompts.parse(item.caption) == prompts.Claim(item.background, groups, item.relation), item.caption


def test_what_a_caption_leaves_out_is_not_claimed():
    claim = prompts.parse("A blue square is below two circles.")
    assert claim == prompts.Claim(
        None,
        (prompts.ClaimedGroup(1, None, "blue", "square"), prompts.ClaimedGroup(2, None, None, "circle")),
        "below",
    )
    held = prompts.judge(reader.Reading("white", ()), claim)
    assert list(held) == ["count", "shape 1", "color 1", "shape 2", "shape 3", "relation"]
    assert not any(held.values())


@pytest.mark.parametrize(
    ("caption", "where"),
    [
        ("a photo of a cat", "a photo of a cat"),
        ("two large mauve circles on a white background", "two large mauve"),
        ("a large red circle above", "above"),
        ("a large red circle beside a small blue square", "beside"),
        ("a red circle above a blue square left of a red cross", "a blue square left of"),
        ("four small red circles", "four"),
        ("", "empty"),
    ],
)
def test_other_captions_are_refused_by_name(caption, where):
    with pytest.raises(prompts.CaptionError) as error:
        prompts.parse(caption)
    assert repr(caption) in str(error.value)
    assert where in str(error.value)


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("split", ["test", "held_out"])
def test_true_renderings_keep_their_captions(size, split):
    items = scenes.scenes(range(200), seed=21, split=split)
    pictures = scenes.render_batch(items, size)
    figures = prompts.summarize([prompts.score(p, item.caption) for p, item in zip(pictures, items, strict=True)])
    assert figures["count"] == 200
    assert figures["statements"] >= 0.995
    assert figures["all_statements"] >= 0.99
    assert set(figures["by_kind"]) == set(prompts.KINDS)


def _truth(told, shown):
    """The statements of one scene's caption about another scene, from the two structures alone."""
    owners = [group for i, group in enumerate(told.groups) for group in [(i, group)] * group.count]
    things = [*shown.objects, *[None] * 3]
    best = None
    for chosen in itertools.permutations(range(len(things)), len(owners)):
        picked = [things[k] for k in chosen]
        held = {}
        for n, ((_, group), thing) in enumerate(zip(owners, picked, strict=True), 1):
            other = shown.groups[thing.group] if thing else None
            for kind in ("shape", "color", "size"):
                held[f"{kind} {n}"] = other is not None and getattr(other, kind) == getattr(group, kind)
        if told.relation:
            held["relation"] = None not in picked and _stands(told.relation, owners, picked)
        if best is None or (sum(held.values()), list(held.values())) > (sum(best.values()), list(best.values())):
            best = held
    return {
        "background": told.background == shown.background,
        "count": len(told.objects) == len(shown.objects),
        **best,
    }


def _stands(relation, owners, picked):
    """Whether the first group's objects are all to that side, and more so than above or below (and so on)."""
    sides = [[t for (i, _), t in zip(owners, picked, strict=True) if i == group] for group in (0, 1)]
    along = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}[relation]
    places = [[along[0] * t.x + along[1] * t.y for t in side] for side in sides]
    means = [np.mean([(t.x, t.y) for t in side], axis=0) for side in sides]
    ahead, aside = np.abs(means[0] - means[1])[[0, 1] if along[0] else [1, 0]]
    return min(places[0]) > max(places[1]) and ahead >= aside


@pytest.mark.parametrize("size", [32, 64])
def test_false_statements_are_caught_and_true_ones_are_not(size):
    """Captions of other scenes: on average two statements in three are false there."""
    items = scenes.scenes(range(200), seed=22)
    pictures = scenes.render_batch(items, size)
    false = caught = true = kept = 0
    for told, shown, picture in zip(items[1:] + items[:1], items, pictures, strict=True):
        read, truth = prompts.score(picture, told.caption), _truth(told, shown)
        assert list(read) == list(truth)
        false += sum(not held for held in truth.values())
        caught += sum(not held and not read[name] for name, held in truth.items())
        true += sum(truth.values())
        kept += sum(held and read[name] for name, held in truth.items())
    assert false > 750
    assert caught >= 0.995 * false
    assert kept >= 0.995 * true


def _variants(item):
    """The scene with one thing changed, and the statement that this makes false of the old caption."""
    other = {name: list(table)[(list(table).index(name) + 1) % len(table)] for table in _TABLES for name in table}
    yield "background", dataclasses.replace(item, background=other[item.background])
    if len(item.objects) > 1:
        yield "count", dataclasses.replace(item, objects=item.objects[:-1])
    for field in ("shape", "color", "size"):
        changed = dataclasses.replace(item.groups[0], **{field: other[getattr(item.groups[0], field)]})
        scale = (0.19 if changed.size == "small" else 0.31) if field == "size" else None
        things = tuple(dataclasses.replace(t, diameter=scale) if scale and t.group == 0 else t for t in item.objects)
        yield f"{field} 1", dataclasses.replace(item, groups=(changed, *item.groups[1:]), objects=things)
    if item.relation:
        flipped = tuple(dataclasses.replace(t, x=1 - t.x, y=1 - t.y) for t in item.objects)
        yield "relation", dataclasses.replace(item, objects=flipped)


_TABLES = (tuple(scenes.BACKGROUNDS), tuple(scenes.COLORS), scenes.SHAPES, tuple(scenes.SIZES))


@pytest.mark.parametrize("size", [32, 64])
def test_each_single_change_is_caught_by_its_statement(size):
    """One attribute of one group changed: its statement turns false, and (the count apart) no other."""
    for item in scenes.scenes(range(60), seed=23):
        if len({(g.color, g.shape, g.size) for g in item.groups}) == 2 and item.groups[0].shape == item.groups[1].shape:
            continue  # groups so alike that the changed one may be matched with the other
        claim = prompts.parse(item.caption)
        for statement, changed in _variants(item):
            if len(item.groups) == 2 and statement[:-2] in ("shape", "color", "size"):
                kind = statement[:-2]
                if getattr(changed.groups[0], kind) == getattr(item.groups[1], kind):
                    continue
            held = prompts.judge(reader.read(scenes.render(changed, size)), claim)
            assert not held[statement], (statement, item.caption)
            if statement in ("background", "relation"):
                assert [name for name, value in held.items() if not value] == [statement]


def _things(*places):
    return [reader.SeenObject("red", "circle", "small", x, y, 0.2) for x, y in places]


@pytest.mark.parametrize(
    ("first", "second", "relation"),
    [
        ([(0.2, 0.5)], [(0.8, 0.6)], "left"),
        ([(0.8, 0.5)], [(0.2, 0.6)], "right"),
        ([(0.5, 0.2)], [(0.4, 0.8)], "above"),
        ([(0.5, 0.8)], [(0.4, 0.2)], "below"),
        ([(0.2, 0.2), (0.2, 0.8)], [(0.8, 0.5)], "left"),
        ([(0.2, 0.2), (0.9, 0.8)], [(0.8, 0.5)], None),
        ([(0.2, 0.2)], [(0.3, 0.8)], "above"),  # a little to the left, but above it
    ],
)
def test_relations(first, second, relation):
    assert prompts.relates(_things(*first), _things(*second)) == relation


def test_objects_are_matched_as_favourably_as_possible():
    claim = prompts.parse("a small red circle left of a large blue square on a white background")
    square = reader.SeenObject("blue", "square", "large", 0.7, 0.5, 0.32)
    circle = reader.SeenObject("red", "circle", "small", 0.3, 0.5, 0.19)
    for things in ((square, circle), (circle, square)):
        assert all(prompts.judge(reader.Reading("white", things), claim).values())
    held = prompts.judge(reader.Reading("white", (square,)), claim)
    assert [name for name, value in held.items() if not value] == ["count", "shape 1", "color 1", "size 1", "relation"]
    crowd = tuple(dataclasses.replace(circle, color="green", x=0.1 * i) for i in range(9))
    held = prompts.judge(reader.Reading("white", (*crowd, square)), claim)
    assert not held["count"]
    assert held["shape 2"]


def test_summary_counts_statements_by_kind():
    scores = [
        {"background": True, "count": True, "shape 1": True, "shape 2": False},
        {"background": True, "count": True, "shape 1": True},
    ]
    assert prompts.summarize(scores) == {
        "count": 2,
        "statements": 6 / 7,
        "all_statements": 0.5,
        "by_kind": {"background": 1.0, "count": 1.0, "shape": 2 / 3},
    }
    with pytest.raises(ValueError, match="no scores"):
        prompts.summarize([])
