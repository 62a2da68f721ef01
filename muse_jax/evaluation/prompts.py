"""Which statements of a caption a picture keeps.

A caption is taken apart by its wording alone into statements: the background, how many objects
there are, each object's shape, colour and size, and the relation of the two groups. A picture is
read by `muse_jax.evaluation.reader`, and each statement is held against what was read.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from muse_jax.data import scenes
from muse_jax.evaluation import reader

KINDS = ("background", "count", "shape", "color", "size", "relation")
_MOST_MATCHED = 6  # objects seen that are tried as those of the caption; the largest ones


class CaptionError(ValueError):
    """A caption outside the grammar of scenes."""


@dataclasses.dataclass(frozen=True)
class ClaimedGroup:
    """Equal objects that a caption speaks of; None is what it does not mention."""

    count: int
    size: str | None
    color: str | None
    shape: str


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a caption says; `relation` is how the first group stands to the second."""

    background: str | None
    groups: tuple[ClaimedGroup, ...]
    relation: str | None

    @property
    def objects(self) -> tuple[int, ...]:
        """The group of each object."""
        return tuple(i for i, group in enumerate(self.groups) for _ in range(group.count))


# ------------------------------------------------------------------------- wording to statements


def _any_of(phrases: Iterable[str]) -> str:
    return "|".join(sorted((re.escape(p) for p in phrases), key=len, reverse=True))


_COUNTS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3}
_SIZES = {word: size for size, words in scenes.SIZE_WORDS.items() for word in words}
_NOUNS = {word: shape for shape in scenes.SHAPES for word in (shape, scenes.PLURALS[shape])}
_RELATIONS = {phrase: relation for relation, phrases in scenes.RELATIONS.items() for phrase in phrases}

_GROUP = re.compile(
    rf"(?P<count>{_any_of(_COUNTS)})(?: (?P<size>{_any_of(_SIZES)}))?"
    rf"(?: (?P<color>{_any_of(scenes.COLORS)}))? (?P<noun>{_any_of(_NOUNS)})"
)
_RELATION = re.compile(rf" (?:is |are )?(?P<relation>{_any_of(_RELATIONS)}) ")
_BACKGROUND = rf"an? (?P<background>{_any_of(scenes.BACKGROUNDS)}) background"
_FORMS = tuple(
    re.compile(form)
    for form in (
        rf"on {_BACKGROUND},? (?P<middle>.+)",
        rf"{_BACKGROUND} with (?P<middle>.+)",
        rf"(?P<middle>.+) on {_BACKGROUND}",
        r"(?P<middle>.+)",
    )
)


def parse(caption: str) -> Claim:
    """Takes a caption apart.

    >>> parse("two big red circles above a small blue square on a white background").relation
    'above'

    Raises:
      CaptionError: the caption is not worded as captions of scenes are.
    """
    text = " ".join(caption.lower().split()).rstrip(".")
    form = next((match for match in (form.fullmatch(text) for form in _FORMS) if match), None)
    if form is None:
        raise CaptionError(f"the caption {caption!r} is empty.")
    middle = form["middle"]
    first = _GROUP.match(middle)
    if first and first.end() == len(middle):
        groups, relation = (_claimed(first),), None
    else:
        joint = _RELATION.match(middle, first.end()) if first else None
        second = _GROUP.fullmatch(middle, joint.end()) if joint else None
        if not (first and joint and second):
            where = middle[joint.end() if joint else first.end() if first else 0 :].strip()
            raise CaptionError(
                f"cannot read the caption {caption!r} at {where!r}; expected something like "
                "'two large red circles above a small blue square on a white background'."
            )
        groups, relation = (_claimed(first), _claimed(second)), _RELATIONS[joint["relation"]]
    return Claim(form.groupdict().get("background"), groups, relation)


def _claimed(match: re.Match) -> ClaimedGroup:
    return ClaimedGroup(_COUNTS[match["count"]], _SIZES.get(match["size"]), match["color"], _NOUNS[match["noun"]])


# --------------------------------------------------------------------------- statements to truth


def score(image: np.ndarray, caption: str, side: int | None = None) -> dict[str, bool]:
    """Which of the caption's statements the picture, uint8 [s, s, 3] or, with the scene's side, [h, w, 3], keeps.

    Returns:
      statement -> whether it holds. Statements are named by their kind (`KINDS`), those about an
      object with its number after it ("color 2" is the second object of the caption). Statements
      about an object that is not there are false.

    Raises:
      CaptionError: the caption is not worded as captions of scenes are.
      ValueError: not a uint8 picture that can be read.
    """
    return judge(reader.read(image, side), parse(caption))


def judge(reading: reader.Reading, claim: Claim) -> dict[str, bool]:
    """Holds a claim against a reading, its objects assigned to those seen as favourably as possible.

    Of assignments that keep equally many statements, the one that keeps the earlier ones is taken.
    """
    wanted = claim.objects
    seen = sorted(reading.objects, key=lambda thing: -thing.diameter)[:_MOST_MATCHED]
    pool = [*seen, *[None] * max(len(wanted) - len(seen), 0)]
    result = {}
    if claim.background is not None:
        result["background"] = reading.background == claim.background
    result["count"] = len(reading.objects) == len(wanted)
    judged = (_judge_objects(claim, things) for things in itertools.permutations(pool, len(wanted)))
    return result | max(judged, key=lambda held: (sum(held.values()), tuple(held.values())))


def _judge_objects(claim: Claim, things: Sequence[reader.SeenObject | None]) -> dict[str, bool]:
    """The statements about objects, the i-th of the caption being things[i]."""
    held = {}
    for i, (thing, group) in enumerate(zip(things, claim.objects, strict=True), 1):
        for kind in ("shape", "color", "size"):
            said = getattr(claim.groups[group], kind)
            if said is not None:
                held[f"{kind} {i}"] = thing is not None and getattr(thing, kind) == said
    if claim.relation is not None:
        sides = [[t for t, g in zip(things, claim.objects, strict=True) if g == group] for group in (0, 1)]
        held["relation"] = None not in things and relates(*sides) == claim.relation
    return held


def relates(first: Sequence[reader.SeenObject], second: Sequence[reader.SeenObject]) -> str | None:
    """How the first objects stand to the second: one of scenes.RELATIONS, or None where they mingle.

    The direction is that in which their mean centres differ most; and every one of the first must
    lie further in it than every one of the second.
    """
    a, b = (np.array([(thing.x, thing.y) for thing in things]) for things in (first, second))
    shift = b.mean(0) - a.mean(0)
    axis = int(np.abs(shift).argmax())
    if a[:, axis].max() < b[:, axis].min():
        return ("left", "above")[axis]
    if a[:, axis].min() > b[:, axis].max():
        return ("right", "below")[axis]
    return None


def summarize(scores: Sequence[Mapping[str, bool]]) -> dict[str, object]:
    """Accuracies in 0..1 over many pictures' scores.

    Returns:
      count: number of pictures; statements: share of all their statements that hold;
      all_statements: share of pictures of which every statement holds; by_kind: the share of
      each kind of statement that holds.
    """
    if not scores:
        raise ValueError("there are no scores to summarize.")
    pairs = [(name.split()[0], held) for score_ in scores for name, held in score_.items()]
    by_kind = {kind: [held for name, held in pairs if name == kind] for kind in KINDS}
    return {
        "count": len(scores),
        "statements": float(np.mean([held for _, held in pairs])),
        "all_statements": float(np.mean([all(score_.values()) for score_ in scores])),
        "by_kind": {kind: float(np.mean(held)) for kind, held in by_kind.items() if held},
    }
