"""The reader against scenes whose contents are known, clean and spoilt, and against what is no scene."""

import dataclasses

import numpy as np
import pytest
from scipy import ndimage

from muse_jax.data import scenes
from muse_jax.evaluation import reader


def _truth(scene):
    """(shape, colour, size, object) of each object."""
    groups = [scene.groups[thing.group] for thing in scene.objects]
    return [(g.shape, g.color, g.size, thing) for g, thing in zip(groups, scene.objects, strict=True)]


def _errors(scene, reading):
    """What was misread, as words; objects are paired with the nearest ones seen."""
    wrong = ["background"] if reading.background != scene.background else []
    if len(reading.objects) != len(scene.objects):
        return [*wrong, "count"]
    for shape, color, size, thing in _truth(scene):
        seen = min(reading.objects, key=lambda s, t=thing: (s.x - t.x) ** 2 + (s.y - t.y) ** 2)
        pairs = {"shape": (seen.shape, shape), "color": (seen.color, color), "size": (seen.size, size)}
        wrong += [name for name, (found, true) in pairs.items() if found != true]
    return wrong


def _blurred(pictures, sigma):
    out = ndimage.gaussian_filter(pictures.astype(float), (0, sigma, sigma, 0))
    return np.clip(out + 0.5, 0, 255).astype(np.uint8)


def _noisy(pictures, sigma):
    noise = np.random.default_rng(0).normal(0, sigma, pictures.shape)
    return np.clip(pictures + noise, 0, 255).astype(np.uint8)


def _two(first, second, background="white", centers=((0.3, 0.5), (0.7, 0.5)), diameters=(0.32, 0.19)):
    """A scene of two groups of one, put where a test wants them."""
    groups = tuple(
        scenes.Group(1, "large" if d > 0.25 else "small", *g) for g, d in zip((first, second), diameters, strict=True)
    )
    things = tuple(scenes.SceneObject(i, *centers[i], diameters[i]) for i in range(2))
    return scenes.Scene(background, groups, "left", things, "")


@pytest.mark.parametrize("size", [32, 48, 64, 100])
def test_true_renderings_are_read_right(size):
    items = scenes.scenes(range(200 if size < 100 else 40), seed=11)
    readings = reader.read_batch(scenes.render_batch(items, size))
    wrong = [(i, e) for i, (item, r) in enumerate(zip(items, readings, strict=True)) for e in _errors(item, r)]
    assert not wrong


@pytest.mark.parametrize("size", [32, 64])
def test_places_and_diameters_are_subpixel(size):
    for item in scenes.scenes(range(100), seed=5):
        reading = reader.read(scenes.render(item, size))
        for *_, thing in _truth(item):
            error = min(
                max(abs(s.x - thing.x), abs(s.y - thing.y), abs(s.diameter - thing.diameter)) for s in reading.objects
            )
            assert error * size < 0.35


@pytest.mark.parametrize(
    ("spoil", "size"),
    [
        (lambda x: _blurred(x, 0.8), 32),
        (lambda x: _blurred(x, 1.2), 64),
        (lambda x: _noisy(x, 8), 32),
        (lambda x: _noisy(x, 12), 64),
        (lambda x: _noisy(_blurred(x, 0.6), 6), 32),
        (lambda x: (x * 0.94 + 6).astype(np.uint8), 32),  # colours a little off
    ],
    ids=["blur32", "blur64", "noise32", "noise64", "both32", "faded32"],
)
def test_slightly_spoilt_pictures_are_read_right(spoil, size):
    items = scenes.scenes(range(150), seed=12)
    readings = reader.read_batch(spoil(scenes.render_batch(items, size)))
    wrong = sum(len(_errors(item, r)) for item, r in zip(items, readings, strict=True))
    statements = sum(2 + 3 * len(item.objects) for item in items)
    assert wrong <= 0.005 * statements


@pytest.mark.parametrize("background", scenes.BACKGROUNDS)
@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_each_shape_in_each_color_and_size(background, shape):
    for color in scenes.COLORS:
        for size in (32, 64):
            item = _two((color, shape), (color, shape), background)
            assert not _errors(item, reader.read(scenes.render(item, size)))


@pytest.mark.parametrize("sigma", [0, 0.5])
@pytest.mark.parametrize("colors", [("red", "red"), ("red", "yellow"), ("blue", "purple")])
@pytest.mark.parametrize("shapes", [("circle", "circle"), ("square", "square"), ("cross", "triangle")])
def test_objects_that_nearly_touch_are_two(shapes, colors, sigma):
    for gap, size in ((0.04, 32), (0.02, 64)):
        x = 0.5 - (0.32 - 0.19) / 2
        centers = ((x - 0.16 - gap / 2, 0.5), (x + 0.095 + gap / 2, 0.52))
        item = _two((colors[0], shapes[0]), (colors[1], shapes[1]), "gray", centers)
        picture = scenes.render(item, size)[None]
        picture = _blurred(picture, sigma) if sigma else picture
        assert not _errors(item, reader.read(picture[0]))


def test_specks_are_not_objects_but_small_objects_are():
    item = scenes.scene(3)
    picture = scenes.render(item, 64)
    picture[1:3, 1:3] = (220, 40, 40)
    picture[60:62, 5] = (45, 80, 220)
    assert not _errors(item, reader.read(picture))
    picture[56:63, 56:63] = (45, 80, 220)
    assert len(reader.read(picture).objects) == len(item.objects) + 1


def test_an_empty_picture_has_no_objects():
    for name, rgb in scenes.BACKGROUNDS.items():
        reading = reader.read(np.full((32, 32, 3), rgb, np.uint8))
        assert reading == reader.Reading(name, ())


def _ellipse(dx, dy):
    return dx**2 / 4 + dy**2 < 50


def _ring(dx, dy):
    return np.abs(np.hypot(dx, dy) - 9) < 2


def _bar(dx, dy):
    return (np.abs(dx) < 12) & (np.abs(dy) < 3)


def _upside_down(dx, dy):
    return (np.abs(dy) < 11) & (2 * np.abs(dx) < 11 - dy)


def _saltire(dx, dy):
    return (np.abs(np.abs(dx) - np.abs(dy)) < 3) & (np.maximum(np.abs(dx), np.abs(dy)) < 10)


@pytest.mark.parametrize("outline", [_ellipse, _ring, _bar, _upside_down, _saltire])
def test_other_shapes_are_unclear(outline):
    dx, dy = np.meshgrid(np.arange(64) - 31.5, np.arange(64) - 31.5)
    picture = np.where(outline(dx, dy)[..., None], np.uint8([220, 40, 40]), np.uint8([255, 255, 255]))
    assert [thing.shape for thing in reader.read(picture).objects] == [reader.UNCLEAR]


def test_colors_outside_the_palette_of_objects_are_not_taken_for_one():
    item = _two(("red", "circle"), ("blue", "square"), "black")
    picture = scenes.render(item, 64)
    red = (picture[..., 0] > 100) & (picture[..., 2] < 100)
    picture[red] = 255
    assert {thing.color for thing in reader.read(picture).objects} == {"white", "blue"}


def test_a_background_in_an_objects_color_is_named_so():
    picture = np.full((64, 64, 3), scenes.COLORS["red"], np.uint8)
    picture[20:40, 20:40] = scenes.COLORS["blue"]
    reading = reader.read(picture)
    assert reading.background == "red"
    assert [(thing.color, thing.shape) for thing in reading.objects] == [("blue", "square")]


def test_a_swap_of_colors_changes_the_colors_alone():
    """Nothing but the pixels is looked at: red and blue changed round read as changed round."""
    swapped = {"red": "blue", "blue": "red"}
    for item in scenes.scenes(range(40), seed=4):
        groups = tuple(dataclasses.replace(g, color=swapped.get(g.color, g.color)) for g in item.groups)
        other = dataclasses.replace(item, groups=groups)
        assert not _errors(other, reader.read(scenes.render(other, 64)))


def test_any_picture_can_be_read():
    rng = np.random.default_rng(0)
    for size in (32, 64, 65, 256):
        reader.read(rng.integers(0, 256, (size, size, 3), np.uint8))
    reader.read(np.tile(np.arange(256, dtype=np.uint8)[:, None, None], (1, 256, 3)))


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((64, 64, 3), np.float32), "float32"),
        (np.zeros((64, 48, 3), np.uint8), r"\[64, 48, 3\]"),
        (np.zeros((64, 64), np.uint8), r"\[64, 64\]"),
        (np.zeros((16, 16, 3), np.uint8), "16 pixels"),
    ],
)
def test_what_is_no_such_picture_is_refused(picture, message):
    with pytest.raises(ValueError, match=message):
        reader.read(picture)


def test_coverage_has_the_area_of_the_shape():
    for shape, share in {"circle": np.pi / 4, "square": 1, "triangle": 0.5, "cross": 5 / 9}.items():
        cover = reader.coverage(shape, 15.3, 16.1, 18.0, 32, 32)
        np.testing.assert_allclose(cover.sum(), share * 18**2, rtol=0.02)
        assert cover.min() >= 0
        assert cover.max() <= 1
