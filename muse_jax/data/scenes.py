"""Generated captioned scenes: coloured shapes on a background, from an index and a seed alone.

A scene has one or two groups of equal objects ("two small green triangles"), one to three objects
in all; two groups stand in a relation. Everything is integer hashing and plain arithmetic, so the
same index gives the same scene and the same pixels on any machine.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

VERSION = 1  # part of the data's fingerprint: change it with anything that changes a scene

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 80, 220),
    "yellow": (240, 205, 40),
    "purple": (140, 60, 170),
    "orange": (240, 130, 30),
}
BACKGROUNDS = {"white": (255, 255, 255), "black": (15, 15, 15), "gray": (128, 128, 128), "pink": (255, 190, 205)}
SHAPES = ("circle", "square", "triangle", "cross")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
SIZES = {"small": (0.17, 0.21), "large": (0.30, 0.34)}  # side of the bounding box, share of the picture
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
COUNT_WORDS = {1: "a", 2: "two", 3: "three"}
RELATIONS = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
HELD_OUT = (("green", "circle"), ("purple", "square"), ("yellow", "triangle"))  # never in train or test
CLASSES = tuple((color, shape) for color in COLORS for shape in SHAPES)  # of a single object; the label is the place
SPLITS = {"train": 10_000_000, "test": 100_000, "held_out": 100_000}  # scenes in each

_PAIRS = tuple((c, s) for c in COLORS for s in SHAPES if (c, s) not in HELD_OUT)
# Counts of the one or two groups, with how often each is drawn.
_COUNTS = (((1,), 0.2), ((2,), 0.125), ((3,), 0.125), ((1, 1), 0.3), ((1, 2), 0.125), ((2, 1), 0.125))
_DRAWS = 128  # uniform numbers for a scene
_TRIES = 12  # placements tried before the anchors themselves are taken
_GAP = 0.04  # least space between bounding boxes

WORDS = tuple(
    sorted(
        {"a", "an", "on", "background", "with", "is", "are", ","}
        | set(COLORS)
        | set(BACKGROUNDS)
        | set(SHAPES)
        | set(PLURALS.values())
        | {w for words in SIZE_WORDS.values() for w in words}
        | set(COUNT_WORDS.values())
        | {w for phrases in RELATIONS.values() for phrase in phrases for w in phrase.split()}
    )
)


@dataclasses.dataclass(frozen=True)
class Group:
    """Equal objects."""

    count: int
    size: str
    color: str
    shape: str


@dataclasses.dataclass(frozen=True)
class SceneObject:
    """One object; centre and diameter are shares of the picture's side, y grows downward."""

    group: int
    x: float
    y: float
    diameter: float


@dataclasses.dataclass(frozen=True)
class Scene:
    """What is in a picture; `relation` says how the first group stands to the second."""

    background: str
    groups: tuple[Group, ...]
    relation: str | None
    objects: tuple[SceneObject, ...]
    caption: str


class _Draws:
    """The uniform numbers of one scene, used up in order."""

    def __init__(self, values: np.ndarray):
        self._values = values.tolist()
        self._next = 0

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        self._next += 1
        return low + (high - low) * self._values[self._next - 1]

    def choice(self, options: Sequence):
        return options[int(self.uniform() * len(options))]


def _uniforms(indices: np.ndarray, seed: int, split: str) -> np.ndarray:
    """[len(indices), _DRAWS] numbers in [0, 1): splitmix64 of (seed, split, index, position)."""
    stream = _splitmix(np.array([seed % 2**32 * 8 + list(SPLITS).index(split)], np.uint64))
    rows = _splitmix(np.asarray(indices).astype(np.uint64) ^ stream)
    step = np.arange(1, _DRAWS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (_splitmix(rows[:, None] + step[None, :]) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _splitmix(z: np.ndarray) -> np.ndarray:
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def scene(index: int, seed: int = 0, split: str = "train") -> Scene:
    """The scene of an index.

    Args:
      index: any integer from 0.
      split: "train" and "test" never show a pair of `HELD_OUT`; each scene of "held_out" does.
    """
    return scenes([index], seed, split)[0]


def scenes(indices: Sequence[int], seed: int = 0, split: str = "train") -> list[Scene]:
    """The scenes of many indices; quicker than one by one."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {', '.join(SPLITS)}.")
    return [_scene(_Draws(row), split) for row in _uniforms(np.asarray(indices), seed, split)]


def _scene(draws: _Draws, split: str) -> Scene:
    background = draws.choice(tuple(BACKGROUNDS))
    counts = _counts(draws.uniform())
    pairs: list[tuple[str, str]] = []
    held_out = int(draws.uniform() * len(counts)) if split == "held_out" else -1
    for i in range(len(counts)):
        options = HELD_OUT if i == held_out else _PAIRS
        pairs.append(draws.choice([pair for pair in options if pair not in pairs]))
    groups = tuple(Group(count, draws.choice(tuple(SIZES)), *pair) for count, pair in zip(counts, pairs, strict=True))
    relation = draws.choice(tuple(RELATIONS)) if len(groups) == 2 else None
    caption = _caption(background, groups, relation, draws)
    return Scene(background, groups, relation, _place(groups, relation, draws), caption)


def single_objects(indices: Sequence[int], seed: int = 0, split: str = "train") -> list[Scene]:
    """Scenes of one object of any of `CLASSES`, `HELD_OUT` too: a class can't be drawn that was never seen."""
    return [_single_object(_Draws(row)) for row in _uniforms(np.asarray(indices), seed, split)]


def _single_object(draws: _Draws) -> Scene:
    background = draws.choice(tuple(BACKGROUNDS))
    color, shape = draws.choice(CLASSES)
    groups = (Group(1, draws.choice(tuple(SIZES)), color, shape),)
    caption = _caption(background, groups, None, draws)
    return Scene(background, groups, None, _place(groups, None, draws), caption)


def label(item: Scene) -> int:
    """The place in `CLASSES` of a scene's first group."""
    return CLASSES.index((item.groups[0].color, item.groups[0].shape))


def _counts(u: float) -> tuple[int, ...]:
    for counts, share in _COUNTS:
        if u < share:
            return counts
        u -= share
    return _COUNTS[-1][0]


def _caption(background: str, groups: tuple[Group, ...], relation: str | None, draws: _Draws) -> str:
    phrases = []
    for group in groups:
        noun = PLURALS[group.shape] if group.count > 1 else group.shape
        phrases.append(f"{COUNT_WORDS[group.count]} {draws.choice(SIZE_WORDS[group.size])} {group.color} {noun}")
    form = draws.choice(("end", "front", "verb", "with"))
    middle = phrases[0]
    if relation is not None:
        verb = ("is " if groups[0].count == 1 else "are ") if form == "verb" else ""
        middle = f"{phrases[0]} {verb}{draws.choice(RELATIONS[relation])} {phrases[1]}"
    if form == "front":
        return f"on a {background} background, {middle}"
    if form == "with":
        return f"a {background} background with {middle}"
    return f"{middle} on a {background} background"


def _place(groups: tuple[Group, ...], relation: str | None, draws: _Draws) -> tuple[SceneObject, ...]:
    """Objects near the anchors of their arrangement, jittered, never touching."""
    anchors = _anchors(groups, relation, draws)
    owners = [i for i, group in enumerate(groups) for _ in range(group.count)]
    diameters = [draws.uniform(*SIZES[groups[i].size]) for i in owners]
    for attempt in range(_TRIES):
        jitter = 1.0 - attempt / _TRIES  # narrower each time, so that it ends
        objects = tuple(
            SceneObject(i, x + jitter * draws.uniform(-jx, jx), y + jitter * draws.uniform(-jy, jy), d)
            for i, d, (x, y, jx, jy) in zip(owners, diameters, anchors, strict=True)
        )
        if all(_apart(a, b) for k, a in enumerate(objects) for b in objects[:k]):
            return objects
    raise AssertionError("the anchors themselves are apart")  # pragma: no cover


def _apart(a: SceneObject, b: SceneObject) -> bool:
    return max(abs(a.x - b.x), abs(a.y - b.y)) >= (a.diameter + b.diameter) / 2 + _GAP


def _anchors(groups: tuple[Group, ...], relation: str | None, draws: _Draws) -> list[tuple[float, float, float, float]]:
    """(x, y, jitter of x, jitter of y) of each object."""
    low, high, mid, tight, loose = 0.27, 0.73, 0.5, 0.06, 0.15
    if len(groups) == 1 and groups[0].count == 3:  # two at one side, one at the other
        return _turned([(low, low), (high, low), (mid, high)], [(tight, tight)] * 3, int(draws.uniform() * 4))
    if len(groups) == 1 and groups[0].count == 1:
        return [(mid, mid, 0.18, 0.18)]
    if len(groups) == 1:
        return _turned([(low, mid), (high, mid)], [(tight, loose)] * 2, int(draws.uniform() * 2))
    points, jitters = [], []
    for x, group in zip((low, high), groups, strict=True):  # the first group at the left
        points += [(x, mid)] if group.count == 1 else [(x, low), (x, high)]
        jitters += [(tight, loose)] if group.count == 1 else [(tight, tight)] * 2
    return _turned(points, jitters, {"left": 0, "above": 1, "right": 2, "below": 3}[relation])


def _turned(points: list, jitters: list, quarters: int) -> list[tuple[float, float, float, float]]:
    """Turned about the centre by quarters, clockwise: left goes to the top."""
    placed = []
    for (x, y), (jx, jy) in zip(points, jitters, strict=True):
        for _ in range(quarters):
            x, y, jx, jy = 1.0 - y, x, jy, jx
        placed.append((x, y, jx, jy))
    return placed


def render(item: Scene, size: int) -> np.ndarray:
    """The picture of a scene: uint8 [size, size, 3], anti-aliased."""
    return render_batch([item], size)[0]


def render_batch(items: Sequence[Scene], size: int) -> np.ndarray:
    """The pictures of scenes: uint8 [n, size, size, 3]."""
    out = np.empty((len(items), size, size, 3), np.float32)
    out[:] = np.array([BACKGROUNDS[item.background] for item in items], np.float32)[:, None, None]
    for picture, item in zip(out, items, strict=True):
        for thing in item.objects:
            _draw(picture, thing, item.groups[thing.group], size)
    return (out + 0.5).astype(np.uint8)


def _draw(picture: np.ndarray, thing: SceneObject, group: Group, size: int) -> None:
    """Blends an object into the part of the picture that it can touch."""
    radius = thing.diameter / 2 * size
    left, top = (max(int(c * size - radius - 1), 0) for c in (thing.x, thing.y))
    right, bottom = (min(int(c * size + radius + 2), size) for c in (thing.x, thing.y))
    dx = np.arange(left, right, dtype=np.float32)[None, :] + np.float32(0.5 - thing.x * size)
    dy = np.arange(top, bottom, dtype=np.float32)[:, None] + np.float32(0.5 - thing.y * size)
    cover = np.clip(0.5 - _distance(group.shape, dx, dy, np.float32(radius)), 0, 1)[..., None]
    part = picture[top:bottom, left:right]
    part += cover * (np.array(COLORS[group.color], np.float32) - part)


def _distance(shape: str, dx: np.ndarray, dy: np.ndarray, r: np.float32) -> np.ndarray:
    """Signed distance in pixels to the outline of a shape that fills a box of half-side r; negative inside."""
    ax, ay = np.abs(dx), np.abs(dy)
    if shape == "circle":
        return np.sqrt(dx * dx + dy * dy) - r
    if shape == "square":
        return np.maximum(ax, ay) - r
    if shape == "triangle":  # apex at the top, base at the bottom
        return np.maximum(dy - r, (2 * ax - dy - r) * np.float32(5**-0.5))
    third = r / 3
    return np.minimum(np.maximum(ax - r, ay - third), np.maximum(ax - third, ay - r))
