"""Cases of editing: the true picture of the new caption passes, the picture as it was given does not."""

import dataclasses

import numpy as np
import pytest

from muse_jax.data import scenes
from muse_jax.evaluation import edits, prompts

CASES = edits.cases(24)


def rendered(case, size=64):
    """The given picture with the group as the prompt says."""
    claim = prompts.parse(case.caption)
    groups = tuple(
        dataclasses.replace(group, color=said.color, shape=said.shape)
        for group, said in zip(case.scene.groups, claim.groups, strict=True)
    )
    return scenes.render(dataclasses.replace(case.scene, groups=groups), size)


def test_a_perfect_edit_scores_one_and_no_edit_changes_nothing():
    perfect = edits.summarize([(case, rendered(case)) for case in CASES], "rest")
    assert perfect == {"count": 24, "changed": 1.0, "others": 1.0, "others_all": 1.0}
    undone = edits.summarize([(case, scenes.render(case.scene, 64)) for case in CASES], "rest")
    assert undone == {"count": 24, "changed": 0.0, "others": 1.0, "others_all": 1.0}


def test_for_classes_one_object_becomes_another_class():
    asked = edits.cases(24, seed=2, classes=True)
    assert {case.prompt for case in asked} <= {" ".join(pair) for pair in scenes.CLASSES}
    perfect = edits.summarize([(case, rendered(case)) for case in asked], "kept")
    assert perfect == {"count": 24, "changed": 1.0, "others": 1.0, "others_all": 1.0}
    undone = edits.summarize([(case, scenes.render(case.scene, 64)) for case in asked], "kept")
    assert undone["changed"] == 0


def test_what_is_lost_outside_is_counted():
    blank = [(case, np.full_like(rendered(case), 255)) for case in CASES]
    lost = edits.summarize(blank, "kept")
    assert lost["changed"] == 0
    assert lost["others_all"] < 0.5


def test_the_box_holds_the_object_and_no_other():
    for case in CASES:
        before, after = scenes.render(case.scene, 64), rendered(case)
        differs = np.argwhere((before != after).any(axis=-1))  # rows are y
        left, top, right, bottom = (round(64 * side) for side in case.box)
        assert (differs >= [top, left]).all()
        assert (differs < [bottom, right]).all()


@pytest.mark.parametrize("attribute", ["color", "shape"])
def test_one_attribute_changes_and_no_held_out_pair_is_asked_for(attribute):
    for case in edits.cases(30, seed=1, attributes=(attribute,)):
        claim = prompts.parse(case.prompt)
        pairs = {(group.color, group.shape) for group in claim.groups}
        assert not pairs & set(scenes.HELD_OUT)
        assert len(pairs) == len(claim.groups)
        changes = sum(
            (old.color, old.shape) != (new.color, new.shape)
            for old, new in zip(case.scene.groups, claim.groups, strict=True)
        )
        assert changes == 1
        assert all(name.startswith(attribute) for name in case.changed)
