"""Edits of generated scenes whose success can be read from the pixels.

A case is a true picture and the caption of what it is to become: one group's colour or shape is
another. After the edit the new statement must hold, and those about everything else as before. For a
pipeline with classes the picture shows one object, and the prompt is the class that it is to become.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from muse_jax.data import scenes
from muse_jax.evaluation import prompts

MARGIN = 0.05  # around an object's bounding box, share of the picture


@dataclasses.dataclass(frozen=True)
class Case:
    """One edit.

    Attributes:
      scene: what the given picture shows.
      prompt: what is asked for: the caption, or a class.
      caption: the scene's with the group's new colour or shape.
      box: left, top, right, bottom about the group's objects, shares of the picture.
      changed: names of the statements that are new (see `prompts.score`).
      kept: names of those about what is outside the box: the background and the other group's objects.
      rest: names of all that are not new.
    """

    scene: scenes.Scene
    prompt: str
    caption: str
    box: tuple[float, float, float, float]
    changed: tuple[str, ...]
    kept: tuple[str, ...]
    rest: tuple[str, ...]


def cases(
    count: int, seed: int = 0, attributes: Sequence[str] = ("color", "shape"), classes: bool = False
) -> list[Case]:
    """Edits of held-out scenes that have a group of one object; the attributes take turns."""
    found: list[Case] = []
    make = scenes.single_objects if classes else scenes.scenes
    start = 0
    while len(found) < count:
        for index, scene in enumerate(make(range(start, start + 2 * count), seed, "test"), start):
            single = [i for i, group in enumerate(scene.groups) if group.count == 1]
            if single and len(found) < count:
                rng = np.random.default_rng([seed, index])
                attribute = attributes[len(found) % len(attributes)]
                found.append(_case(scene, int(rng.choice(single)), attribute, classes, rng))
        start += 2 * count
    return found


def _case(scene: scenes.Scene, chosen: int, attribute: str, classes: bool, rng: np.random.Generator) -> Case:
    group = scene.groups[chosen]
    taken = {(other.color, other.shape) for other in scene.groups} | set(() if classes else scenes.HELD_OUT)
    values = scenes.COLORS if attribute == "color" else scenes.SHAPES
    options = [dataclasses.replace(group, **{attribute: value}) for value in values]
    new = [option for option in options if (option.color, option.shape) not in taken]
    become = new[int(rng.integers(len(new)))]
    caption = scene.caption.replace(f"{group.color} {group.shape}", f"{become.color} {become.shape}")
    prompt = f"{become.color} {become.shape}" if classes else caption
    claim = prompts.parse(caption)
    numbers = {own: [n for n, g in enumerate(claim.objects, 1) if (g == chosen) is own] for own in (True, False)}
    changed = tuple(f"{attribute} {n}" for n in numbers[True])
    kept = ("background", *(f"{kind} {n}" for n in numbers[False] for kind in ("shape", "color", "size")))
    own = (f"{kind} {n}" for n in numbers[True] for kind in ("shape", "color", "size") if kind != attribute)
    relation = () if scene.relation is None else ("relation",)
    return Case(scene, prompt, caption, _box(scene, chosen), changed, kept, (*kept, "count", *own, *relation))


def _box(scene: scenes.Scene, chosen: int) -> tuple[float, float, float, float]:
    things = [thing for thing in scene.objects if thing.group == chosen]
    low = [min(getattr(t, axis) - t.diameter / 2 for t in things) - MARGIN for axis in ("x", "y")]
    high = [max(getattr(t, axis) + t.diameter / 2 for t in things) + MARGIN for axis in ("x", "y")]
    left, top, right, bottom = np.clip([*low, *high], 0.0, 1.0).tolist()
    return left, top, right, bottom


def summarize(done: Sequence[tuple[Case, np.ndarray]], others: str) -> dict[str, Any]:
    """What came of edits.

    Args:
      done: cases and the pictures made, uint8 [s, s, 3].
      others: "kept" or "rest": which other statements are looked at.

    Returns:
      count; changed: share of cases in which the new statement holds; others: share of the other
      statements that hold; others_all: share of cases in which all of them do.
    """
    scores = [(case, prompts.score(image, case.caption)) for case, image in done]
    held = [[score[name] for name in getattr(case, others)] for case, score in scores]
    return {
        "count": len(done),
        "changed": float(np.mean([all(score[name] for name in case.changed) for case, score in scores])),
        "others": float(np.mean([value for values in held for value in values])),
        "others_all": float(np.mean([all(values) for values in held])),
    }


def measure(pipeline: Any, count: int, seed: int, advance: Callable[[int], Any]) -> dict[str, Any]:
    """How well a pipeline edits true pictures.

    Args:
      pipeline: with the methods `inpaint`, `edit` and `outpaint` of `MusePipeline`.
      count: cases of each way.
      seed: of the scenes and the sampling.
      advance: called with the number of pictures that were made.

    Returns:
      inpainting: one object's colour or shape is changed by painting its box anew; the others are
      the statements about what is outside the box. mask_free: one object's colour is changed
      without a mask; the others are all that aren't new. outpainting: extended to the right by half;
      pixels_kept is the share of pictures that hold the given part bit for bit.
    """
    size = pipeline.image_size
    by_class = bool(pipeline.classes)
    both, colors = cases(count, seed, classes=by_class), cases(count, seed, ("color",), by_class)

    def made(method: str, cases: Sequence[Case], each: Callable[[Sequence[Case]], dict[str, Any]]) -> np.ndarray:
        images = []
        for start in range(0, len(cases), pipeline.max_batch_size):
            chunk = cases[start : start + pipeline.max_batch_size]
            given = [scenes.render(case.scene, size) for case in chunk]
            seeds = [(seed + start + i) % 2**32 for i in range(len(chunk))]
            arguments = {"prompt": [case.prompt for case in chunk], **each(chunk)}
            call = getattr(pipeline, method)
            images.append(call(image=given, seed=seeds, output_type="uint8", **arguments).images)
            advance(len(chunk))
        return np.concatenate(images)

    def box(case: Case) -> tuple[int, ...]:
        return tuple(round(side * size) for side in case.box)

    def shown(scene: scenes.Scene) -> str:
        return " ".join(scenes.CLASSES[scenes.label(scene)]) if by_class else scene.caption

    painted = made("inpaint", both, lambda chunk: {"mask_image": [box(case) for case in chunk]})
    free = made("edit", colors, lambda chunk: {})
    right = max(1, size // 2 // pipeline.cell) * pipeline.cell
    extended = made("outpaint", both, lambda chunk: {"right": right, "prompt": [shown(case.scene) for case in chunk]})
    kept = [np.array_equal(e[:, :size], scenes.render(c.scene, size)) for e, c in zip(extended, both, strict=True)]
    return {
        "inpainting": summarize(list(zip(both, painted, strict=True)), "kept"),
        "mask_free": summarize(list(zip(colors, free, strict=True)), "rest"),
        "outpainting": {"count": count, "pixels_kept": float(np.mean(kept))},
    }
