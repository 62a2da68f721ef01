"""Reads scenes from pixels: background, and each object's colour, shape, size and place.

The reader knows the vocabulary (the named colours, backgrounds, shapes and the two sizes of
`muse_jax.data.scenes`) and nothing of how a scene was drawn. It has to stand what a tokenizer's
decoder does to a picture: soft edges, colours a little off, specks, objects that nearly touch. So
it works by fitting: each blob of pixels that differ from the background is compared, in sub-pixel
coordinates, with every shape of the same area and centre, and the shape and colour that leave the
least of the blob unexplained are what it is read as.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy import ndimage

from muse_jax.data import scenes

UNCLEAR = "unclear"  # the shape of a blob that looks like none of the shapes

_WORKING_SIDE = 64  # larger pictures are averaged down to this; everything is readable there
_LARGE_FROM = (scenes.SIZES["small"][1] + scenes.SIZES["large"][0]) / 2
_SPECK = 0.4 * scenes.SIZES["small"][0] ** 2 / 2  # under 40% of the area of the smallest object, a triangle
_FOREGROUND = 0.5  # share of an object's colour in a pixel that belongs to it
_UNCLEAR_FROM = 0.2  # share of a blob's energy that the best shape may leave unexplained
_GOOD = 0.04  # a shape that leaves less than this unexplained is not doubted
_SPLIT_GAIN = 0.6  # parts are taken for the whole if they leave less than this of what it leaves
_BLURS = (0.0, 0.8)  # widths (pixels) of the edges that a blob is compared with
_ROWS = 4  # sub-rows of a pixel when a shape's coverage is computed

_NAMES = (*scenes.COLORS, *scenes.BACKGROUNDS)
_RGB = np.array([*scenes.COLORS.values(), *scenes.BACKGROUNDS.values()], np.float32)
_OBJECT_RGB = _RGB[: len(scenes.COLORS)]

# Shares of the bounding box: area, and how far the centre of gravity lies below the box's centre.
_AREAS = {"circle": np.pi / 4, "square": 1.0, "triangle": 1 / 2, "cross": 5 / 9}
_DROPS = {"circle": 0.0, "square": 0.0, "triangle": 1 / 6, "cross": 0.0}


@dataclasses.dataclass(frozen=True)
class SeenObject:
    """One object as read; centre and diameter are shares of the picture's side, y grows downward."""

    color: str  # the nearest of COLORS and BACKGROUNDS
    shape: str  # of SHAPES, or `UNCLEAR`
    size: str  # of SIZES
    x: float  # centre of the bounding box
    y: float
    diameter: float  # side of the bounding box


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a picture shows."""

    background: str  # the nearest of COLORS and BACKGROUNDS
    objects: tuple[SeenObject, ...]


@dataclasses.dataclass(frozen=True)
class _Fit:
    """The best shape for a blob, in pixels of its window."""

    shape: str
    color: np.ndarray  # [3], difference from the background
    x: float
    y: float
    side: float
    energy: float  # sum of squares of the window's difference from the background
    residual: float  # what of it the shape does not explain


def read(image: np.ndarray, side: int | None = None) -> Reading:
    """What a picture shows: uint8 [s, s, 3], RGB, any size s from 32.

    Args:
      side: of a picture of another form, [h, w, 3], the side of the square scenes that it is an extension of, by
        which objects are small or large.

    Raises:
      ValueError: the picture is not uint8 RGB, not square, or smaller than 32.
    """
    picture, side = _working_picture(image, side)
    background = _background(picture)
    difference = picture - background
    share = _object_share(difference, background)
    labels, count = ndimage.label(share > _FOREGROUND)
    areas = ndimage.sum_labels(share, labels, np.arange(1, count + 1))
    seen = []
    for i, box in enumerate(ndimage.find_objects(labels)):
        if areas[i] < _SPECK * side**2:
            continue
        window = tuple(slice(max(s.start - 3, 0), s.stop + 3) for s in box)
        blob = labels[window] == i + 1
        others = (labels[window] > 0) & ~blob
        for fit in _read_blob(difference[window], background, share[window], blob, others):
            seen.append(_seen(fit, background, side, window))
    return Reading(_name(background), tuple(seen))


def read_batch(images: Sequence[np.ndarray] | np.ndarray) -> list[Reading]:
    """`read` of each picture; a few milliseconds a picture."""
    return [read(image) for image in images]


def _clear(fit: _Fit) -> bool:
    return fit.residual <= _UNCLEAR_FROM * fit.energy


def _seen(fit: _Fit, background: np.ndarray, side: int, window: tuple[slice, ...]) -> SeenObject:
    diameter = fit.side / side
    return SeenObject(
        color=_name(background + fit.color),
        shape=fit.shape if _clear(fit) else UNCLEAR,
        size="large" if diameter >= _LARGE_FROM else "small",
        x=(window[1].start + fit.x) / side,
        y=(window[0].start + fit.y) / side,
        diameter=diameter,
    )


# --------------------------------------------------------------------------- pixels to blobs


def _working_picture(image: np.ndarray, side: int | None) -> tuple[Float[np.ndarray, "h w 3"], int]:
    """The picture as float32 in 0..255, and its scene's side, at most `_WORKING_SIDE`."""
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"expected a uint8 picture [s, s, 3]; got {image.dtype} {list(image.shape)}.")
    if side is None and image.shape[0] != image.shape[1]:
        raise ValueError(f"expected a square picture [s, s, 3], or its scene's side; got {list(image.shape)}.")
    side = side or image.shape[0]
    if min(side, *image.shape[:2]) < 32:
        raise ValueError(f"the picture is {min(image.shape[:2])} pixels wide; objects can be told apart from 32.")
    picture = image.astype(np.float32)
    if side <= _WORKING_SIDE:
        return picture, side
    rows, columns = (_means(length, round(length * _WORKING_SIDE / side)) for length in image.shape[:2])
    return np.einsum("ai,ijc,bj->abc", rows, picture, columns, optimize=True), _WORKING_SIDE


def _means(length: int, parts: int) -> Float[np.ndarray, "p l"]:
    """Weights that average a row of pixels down to so many parts."""
    edges = np.arange(parts + 1) * (length / parts)
    pixels = np.arange(length)
    cover = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (np.clip(cover, 0, 1) * (parts / length)).astype(np.float32)


def _nearest(colors: np.ndarray, table: np.ndarray) -> np.ndarray:
    return np.argmin((table**2).sum(-1) - 2 * colors @ table.T, -1)  # the colours' own squares are in every term


def _name(color: np.ndarray) -> str:
    return _NAMES[int(_nearest(color[None], _RGB)[0])]


def _background(picture: np.ndarray) -> Float[np.ndarray, "3"]:
    """The colour that most of the picture has: the median of the pixels that share the commonest name."""
    names = _nearest(picture, _RGB)
    most = np.bincount(names.ravel(), minlength=len(_NAMES)).argmax()
    return np.median(picture[names == most], axis=0)


def _object_share(difference: np.ndarray, background: np.ndarray) -> Float[np.ndarray, "h w"]:
    """How much of each pixel is an object's colour, the rest being background; 0 to 1.

    A pixel of a soft edge is background + share * (colour - background), for the colour of the
    palette whose line from the background passes nearest.
    """
    lines = _OBJECT_RGB - background
    lengths = (lines**2).sum(1)
    lines, lengths = lines[lengths > 900], lengths[lengths > 900]  # on a red background nothing red can be seen
    along = difference @ lines.T
    shares = np.clip(along / lengths, 0, 1)
    off_line = shares * (shares * lengths - 2 * along)  # squared distance, less that of the pixel itself
    return np.take_along_axis(shares, off_line.argmin(-1)[..., None], -1)[..., 0]


# -------------------------------------------------------------------------- blobs to objects


def _read_blob(
    difference: np.ndarray, background: np.ndarray, share: np.ndarray, blob: np.ndarray, others: np.ndarray
) -> list[_Fit]:
    """One object, or the several that a blob is made of where they are clear and explain it much better."""
    whole = _fit(difference, share, blob, others)
    if whole.residual <= _GOOD * whole.energy:
        return [whole]
    best, least = [whole], _SPLIT_GAIN * whole.residual
    for parts in _partitions(difference + background, share, blob):
        fits = [_fit(difference, share, part, others | (blob & ~part)) for part in parts]
        residual = sum(fit.residual for fit in fits)
        if residual < least and all(_clear(fit) for fit in fits):
            best, least = fits, residual
    return best


def _partitions(picture: np.ndarray, share: np.ndarray, blob: np.ndarray) -> list[list[np.ndarray]]:
    """Ways to take a blob for several objects: by colour, or cut where it is pale or thin."""
    solid = blob & (share > 0.8)
    names = _nearest(picture, _OBJECT_RGB)
    by_color = np.zeros(blob.shape, int)
    for k in np.unique(names[solid]):
        labels, _ = ndimage.label(solid & (names == k))
        by_color = np.where(labels > 0, labels + by_color.max(), by_color)
    found = []
    for seeds in (by_color, ndimage.label(solid)[0], ndimage.label(ndimage.binary_erosion(blob))[0]):
        sizes = np.bincount(seeds.ravel())
        kept = [i for i in range(1, len(sizes)) if sizes[i] >= max(3, 0.12 * sizes[1:].sum())]
        if len(kept) < 2:
            continue
        seeds = np.where(np.isin(seeds, kept), seeds, 0)
        nearest = ndimage.distance_transform_edt(seeds == 0, return_distances=False, return_indices=True)
        owner = seeds[tuple(nearest)]
        found.append([blob & (owner == i) for i in kept])
    return found


def _fit(difference: np.ndarray, share: np.ndarray, blob: np.ndarray, others: np.ndarray) -> _Fit:
    """The shape, colour, place and size that explain a blob best (least squares)."""
    near = ndimage.binary_dilation(blob, iterations=2) & ~ndimage.binary_dilation(others)
    near |= blob
    target = difference * near[..., None]
    fit = _fit_shapes(target, share * near)
    # Once more with how much of each pixel is of the colour that was found, which may be a little
    # off the palette's: the area and with it the size depend on it.
    share = np.clip(target @ fit.color / (fit.color @ fit.color), 0, 1)
    return _fit_shapes(target, share)


def _fit_shapes(target: np.ndarray, share: np.ndarray) -> _Fit:
    height, width = share.shape
    area = float(share.sum())
    x = float(share.sum(0) @ (np.arange(width) + 0.5)) / area
    y = float(share.sum(1) @ (np.arange(height) + 0.5)) / area
    pixels = target.reshape(-1, 3)
    energy = float(np.vdot(target, target))
    best = None
    for shape in scenes.SHAPES:
        side = (area / _AREAS[shape]) ** 0.5
        top = y - _DROPS[shape] * side
        sharp = coverage(shape, x, top, side, height, width)
        for blur in _BLURS:
            cover = _blur(height, blur) @ sharp @ _blur(width, blur) if blur else sharp
            projection = cover.ravel() @ pixels
            square = np.vdot(cover, cover)
            residual = energy - float(projection @ projection / square)
            if best is None or residual < best.residual:
                best = _Fit(shape, projection / square, x, top, side, energy, residual)
    return best


@functools.lru_cache
def _blur(length: int, width: float) -> Float[np.ndarray, "n n"]:
    """Matrix that blurs along an axis with a Gaussian."""
    steps = np.arange(length)
    kernel = np.exp(-0.5 * ((steps[:, None] - steps) / width) ** 2)
    return kernel / (width * np.sqrt(2 * np.pi))


def coverage(shape: str, x: float, y: float, side: float, height: int, width: int) -> Float[np.ndarray, "h w"]:
    """How much of each pixel a shape covers; its bounding box has the centre (x, y), in pixels.

    >>> coverage("square", 1.5, 1.0, 1.0, 2, 3).round(2).tolist()
    [[0.0, 0.5, 0.0], [0.0, 0.5, 0.0]]
    """
    rows = (np.arange(height * _ROWS) + 0.5) / _ROWS
    t = (rows - y) / side  # -1/2 at the top of the box, 1/2 at its bottom
    if shape == "circle":
        half = np.sqrt(np.maximum(0.25 - t * t, 0))
    elif shape == "square":
        half = np.full_like(t, 0.5)
    elif shape == "triangle":
        half = (t + 0.5) / 2
    elif shape == "cross":
        half = np.where(np.abs(t) < 1 / 6, 0.5, 1 / 6)
    else:
        raise ValueError(f"shape is {shape!r}; expected one of {', '.join(scenes.SHAPES)}.")
    half = np.where(np.abs(t) <= 0.5, half * side, 0)[:, None]
    left = np.arange(width)
    spans = np.clip(np.minimum(left + 1, x + half) - np.maximum(left, x - half), 0, 1)
    return spans.reshape(height, _ROWS, width).mean(1)
