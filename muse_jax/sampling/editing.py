"""Editing a given picture: inpainting, outpainting and mask-free editing (Muse, section 3.3).

All of it is the decode loop that makes pictures from nothing, with tokens that are known already,
or with another rule for what is drawn again.
"""

import dataclasses
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image

from muse_jax.sampling import sampler, selection
from muse_jax.sampling.output import MuseOutput
from muse_jax.sampling.requests import Requests, Some

# Muse, section 3.3.2: 100 times a random 8%, guidance 4 (here 5, see `guidance`), the 3 likeliest codes.
ITERATIONS, SHARE = 100, 0.08
EDIT = {"guidance_scale": 5.0, "guidance_ramp": "constant", "top_k": 3, "num_inference_steps": ITERATIONS}
SIDES = ("left", "top", "right", "bottom")


@dataclasses.dataclass(frozen=True)
class Canvas:
    """Pictures and what is to be painted in them.

    Attributes:
      images: at the high resolution.
      repaint: pixels that may change.
    """

    images: UInt8[np.ndarray, "n h w 3"]
    repaint: Bool[np.ndarray, "n h w"]

    def repeated(self, times: int) -> "Canvas":
        """One canvas a picture, from one a prompt."""
        return Canvas(np.repeat(self.images, times, axis=0), np.repeat(self.repaint, times, axis=0))


@dataclasses.dataclass
class Tokens:
    """The tokens of canvases at one resolution, and which places are open; changed in place window by window."""

    ids: Int[np.ndarray, "n r c"]
    open: Bool[np.ndarray, "n r c"]


class Editing:
    """What `MusePipeline` does with pictures that are given.

    An `image` is a PIL picture, an array [h, w, 3] of uint8, or a path; of any size and mode. Its
    shorter side is resized to what the pipeline makes, the longer one cropped about the centre. With
    `resize=False` it is taken as it is, as is wanted of a picture that was outpainted before: its sides
    are then multiples of `cell` and at least `image_size`. Images and masks are one for all prompts, or
    one a prompt. The other arguments are those of a call.
    """

    def inpaint(
        self,
        prompt: Some,
        image: Any,
        mask_image: Any,
        negative_prompt: Some = None,
        guidance_scale: Some = None,
        num_inference_steps: Any = None,
        num_images_per_prompt: Any = 1,
        seed: Some = 0,
        output_type: str = "pil",
        *,
        blend: bool = True,
        resize: bool = True,
        history: bool = False,
        **settings: Any,
    ) -> MuseOutput:
        """Paints the masked part of a picture anew, at all resolutions (section 3.3.1).

        Args:
          image: see `Editing`.
          mask_image: white is repainted: a picture or array [h, w] of the image's size, a path, or a
            box (left, top, right, bottom) in the image's pixels. What is transparent in it is black.
          blend: put the original's pixels back wherever no token was open. Without it they are the
            decoder's, which changes what it was given a little.

        Raises:
          ValueError, TypeError: naming the argument, before anything is compiled.
        """
        given = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps, **settings}
        requests = self._requests(prompt, negative_prompt, num_images_per_prompt, seed)
        if mask_image is None:
            raise ValueError("mask_image is None; give a picture or a box, or use `edit`, which needs none.")
        canvas = self._given(image, mask_image, requests, resize)
        return self._paint(requests, canvas.repeated(requests.images_per_prompt), given, output_type, blend, history)

    def outpaint(
        self,
        prompt: Some,
        image: Any,
        left: int = 0,
        top: int = 0,
        right: int = 0,
        bottom: int = 0,
        negative_prompt: Some = None,
        guidance_scale: Some = None,
        num_inference_steps: Any = None,
        num_images_per_prompt: Any = 1,
        seed: Some = 0,
        output_type: str = "pil",
        *,
        blend: bool = True,
        resize: bool = True,
        **settings: Any,
    ) -> MuseOutput:
        """Extends a picture beyond its sides, by any amount (section 3.3.1).

        What goes beyond the size that the models were trained at is painted by a window of that
        size that moves outward, half of it over what is there already.

        Args:
          image: see `Editing`; here the longer side is kept, as far as it is whole cells.
          left, top, right, bottom: pixels to add. Tokens have sides of `cell` pixels: what is painted
            beyond these amounts is cut off.
        """
        given = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps, **settings}
        requests = self._requests(prompt, negative_prompt, num_images_per_prompt, seed)
        amounts = dict(zip(SIDES, (left, top, right, bottom), strict=True))
        for side, amount in amounts.items():
            if isinstance(amount, bool) or not isinstance(amount, int | np.integer) or amount < 0:
                raise ValueError(f"{side} is {amount!r}; expected a number of pixels of at least 0.")
        if not any(amounts.values()):
            raise ValueError("left, top, right and bottom are all 0; give at least one of them.")
        fitted = _whole_cells if resize else _as_it_is
        pictures = _stacked([fitted(picture, self.image_size, self.cell) for picture in _open_images(image, requests)])
        beyond = {side: -amount % self.cell for side, amount in amounts.items()}
        left, top, right, bottom = (amount + beyond[side] for side, amount in amounts.items())
        around = ((0, 0), (top, bottom), (left, right))
        canvas = Canvas(
            np.pad(pictures, (*around, (0, 0)), mode="edge"),
            np.pad(np.zeros(pictures.shape[:3], bool), around, constant_values=True),
        )
        output = self._paint(requests, canvas.repeated(requests.images_per_prompt), given, output_type, blend, False)
        return dataclasses.replace(output, cut=tuple(extra / self.cell for extra in beyond.values()))

    def edit(
        self,
        prompt: Some,
        image: Any,
        mask_image: Any = None,
        negative_prompt: Some = None,
        guidance_scale: Some = None,
        num_inference_steps: Any = None,
        num_images_per_prompt: Any = 1,
        seed: Some = 0,
        output_type: str = "pil",
        *,
        share: float = SHARE,
        blend: bool = True,
        history: bool = False,
        **settings: Any,
    ) -> MuseOutput:
        """Moves a whole picture towards a prompt, without a mask (section 3.3.2).

        From the picture's low-resolution tokens on, `num_inference_steps` times (default: 100), a
        random share of them is masked and drawn again given the prompt, each time only once, so that
        what fits the prompt stays. Then super-resolution paints the high-resolution tokens. With
        `history`, `MuseOutput.decoding` has every iteration: you may prefer an early one.

        Args:
          image: see `Editing`.
          mask_image: if given, tokens outside the white part stay.
          share: of the tokens masked at each iteration, in (0, 1].
          blend: as `inpaint` has it, of what is outside the mask.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share is {share}; expected more than 0 and at most 1.")
        given = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps, **settings}
        given = EDIT | {name: value for name, value in given.items() if value is not None}
        requests = self._requests(prompt, negative_prompt, num_images_per_prompt, seed)
        canvas = self._given(image, mask_image, requests).repeated(requests.images_per_prompt)
        tokens = self._tokens(canvas)
        originals = self._originals(canvas, tokens) if blend else None
        start = tokens["base"].ids.reshape(len(requests), -1).copy()
        editable = tokens["base"].open.reshape(start.shape)
        for row, places, number in zip(start, editable, requests.seeds, strict=True):
            open_places = np.flatnonzero(places)
            chosen = np.random.default_rng(number).permutation(open_places)[: int(np.ceil(share * len(open_places)))]
            row[chosen] = self.mask_ids["base"]
        loops = {name: Loop(_masked(grid.ids, grid.open, self.mask_ids[name])) for name, grid in tokens.items()}
        loops["base"] = Loop(start, known=~editable, rule=selection.anywhere, keep_count=True)
        return dataclasses.replace(self._call(requests, given, output_type, history, loops), originals=originals)

    # ----------------------------------------------------------------------------------- parts

    def _given(self, image: Any, mask_image: Any, requests: Requests, resize: bool = True) -> Canvas:
        """The given pictures, one a prompt; where there is no mask all of a picture may change."""
        images, masks = _open_images(image, requests), _listed(mask_image, requests, "mask_image")
        repaint = [
            Image.new("L", picture.size, 255) if mask is None else _mask(mask, picture)
            for mask, picture in zip(masks, images, strict=True)
        ]
        size = self.image_size
        pictures = _stacked(
            [_square(picture, size) if resize else _as_it_is(picture, size, self.cell) for picture in images]
        )
        canvas = Canvas(pictures, np.stack([_fitted_mask(mask, size, resize) for mask in repaint]))
        if not canvas.repaint.any(axis=(1, 2)).all():
            raise ValueError(
                "mask_image repaints nothing: no part of it is white (over 127 of 255) in the square that is kept of "
                "the picture, about its centre."
            )
        return canvas

    def _paint(
        self, requests: Requests, canvas: Canvas, given: Mapping, output_type: str, blend: bool, history: bool
    ) -> MuseOutput:
        """Fills what is open in the canvases' tokens, window by window where they are larger than the models."""
        tokens = self._tokens(canvas)
        originals = self._originals(canvas, tokens) if blend else None
        output: Any = None
        last = tokens[self.token_stages[-1]]
        for number, (row, column) in enumerate(self._windows(tokens["base"])):
            windows = {name: self._window(name, row, column) for name in tokens}
            loops = {
                name: Loop(_masked(grid.ids[windows[name]], grid.open[windows[name]], self.mask_ids[name]))
                for name, grid in tokens.items()
            }
            here = dataclasses.replace(requests, seeds=tuple(_another(seed, number) for seed in requests.seeds))
            output = self._call(here, given, output_type, history, loops)
            for name, made in (("base", output.low_tokens), (self.token_stages[-1], output.tokens)):
                tokens[name].ids[windows[name]] = made
                tokens[name].open[windows[name]] = False
        return dataclasses.replace(
            output, seeds=requests.seeds, tokens=last.ids, low_tokens=tokens["base"].ids, originals=originals
        )

    def _tokens(self, canvas: Canvas) -> dict[str, Tokens]:
        """{stage with a decode loop: the canvases' tokens at its resolution}."""
        small = decimated(canvas.images, self.image_size // self.low_image_size)
        ids = {"base": self.encode("tokenizer_low", small)}
        if "superres" in self.token_stages:
            ids["superres"] = self.encode("tokenizer_high", canvas.images)
        return {name: Tokens(grid, touched(canvas.repaint, grid.shape[1:])) for name, grid in ids.items()}

    def _originals(self, canvas: Canvas, tokens: Mapping[str, Tokens]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """{stage that decodes: (pictures, which pixels are repainted)}; pixels follow the tokens that were open."""
        high = canvas.images, _stretched(tokens[self.token_stages[-1]].open, canvas.images.shape[1:3])
        small = decimated(canvas.images, self.image_size // self.low_image_size)
        small = np.clip(np.round(small), 0, 255).astype(np.uint8)
        low = small, _stretched(tokens["base"].open, small.shape[1:3])
        return {"tokenizer_low": low, "tokenizer_high": high, "decoder": high}

    def _windows(self, tokens: Tokens) -> Iterator[tuple[int, int]]:
        """Top left corners, in low-resolution tokens, of windows that move outward from what is known."""
        side = self.grid("base")
        height, width = tokens.ids.shape[1:]
        if (height, width) == side:
            yield 0, 0
            return
        outward = self._windows_outward(~tokens.open.any(axis=0), side)
        # What is open in between, of a mask in a large picture.
        between = itertools.product(_sweep(0, height, side[0]), _sweep(0, width, side[1]))
        for row, column in itertools.chain(outward, between):
            if tokens.open[:, row : row + side[0], column : column + side[1]].any():
                yield row, column

    def _windows_outward(self, known: Bool[np.ndarray, "r c"], side: tuple[int, int]) -> Iterator[tuple[int, int]]:
        height, width = known.shape
        rows, columns = (np.flatnonzero(known.any(axis=axis)).tolist() for axis in (1, 0))
        if not rows:
            return
        # What is known may be less than a window: then the first one reaches beyond it.
        top, left = min(rows[0], height - side[0]), min(columns[0], width - side[1])
        bottom, right = max(rows[-1] + 1, top + side[0]), max(columns[-1] + 1, left + side[1])
        for row in _sweep(top, bottom, side[0]):
            for column in (left, *_outward(left, right, width, side[1])):
                yield row, column
        for row in _outward(top, bottom, height, side[0]):
            for column in _sweep(0, width, side[1]):
                yield row, column

    def _window(self, stage: str, row: int, column: int) -> tuple[slice, slice, slice]:
        sides = self.grid(stage)
        starts = (at * side // low for at, side, low in zip((row, column), sides, self.grid("base"), strict=True))
        return (slice(None), *(slice(start, start + side) for start, side in zip(starts, sides, strict=True)))


@dataclasses.dataclass(frozen=True)
class Loop:
    """What a decode loop starts from.

    Attributes:
      start: tokens [n, places], the mask id where there is something to fill in.
      known: places that never change; None: those that aren't masked.
      rule: the selection rule; None: the plan's.
      keep_count: as many places are masked after each step as at the start, none after the last one.
    """

    start: Int[np.ndarray, "n places"]
    known: Bool[np.ndarray, "n places"] | None = None
    rule: sampler.Select | None = None
    keep_count: bool = False

    def plan(self, plan: sampler.Plan) -> sampler.Plan:
        """The plan as this loop wants it."""
        if not self.keep_count:
            return plan
        kept = np.broadcast_to(np.arange(plan.still_masked.shape[1], dtype=np.int32), plan.still_masked.shape).copy()
        kept[-1] = 0
        return dataclasses.replace(plan, still_masked=kept)


def decimated(images: np.ndarray, factor: int) -> np.ndarray:
    """The mean of each square of `factor` x `factor` pixels: [n, h, w, 3] to float32 [n, h / factor, w / factor, 3]."""
    n, height, width, channels = images.shape
    squares = images.astype(np.float32).reshape(n, height // factor, factor, width // factor, factor, channels)
    return squares.mean(axis=(2, 4))


def touched(repaint: Bool[np.ndarray, "n h w"], grid: Sequence[int]) -> Bool[np.ndarray, "n r c"]:
    """The tokens in whose squares there is a pixel to repaint.

    >>> touched(np.eye(4, dtype=bool)[None], (2, 2)).astype(int).tolist()
    [[[1, 0], [0, 1]]]
    """
    n, height, width = repaint.shape
    rows, columns = grid
    return repaint.reshape(n, rows, height // rows, columns, width // columns).any(axis=(2, 4))


def _stretched(places: np.ndarray, sides: Sequence[int]) -> np.ndarray:
    rows, columns = (side // count for side, count in zip(sides, places.shape[1:], strict=True))
    return places.repeat(rows, axis=1).repeat(columns, axis=2)


def _masked(tokens: np.ndarray, open_: np.ndarray, mask_id: int) -> np.ndarray:
    return np.where(open_, mask_id, tokens).reshape(len(tokens), -1).astype(np.int32)


def _another(seed: int, number: int) -> int:
    """A seed for each window; the first one's is the call's own."""
    return (seed + number * 0x9E3779B9) % 2**32


def _sweep(start: int, stop: int, side: int) -> list[int]:
    """Windows from start to stop, half over each other."""
    offsets = range(start, stop - side, max(1, side // 2))
    return [*offsets, stop - side]


def _outward(start: int, stop: int, total: int, side: int) -> list[int]:
    """Windows beyond what is known, [start, stop), to both ends of a canvas."""
    step = max(1, side // 2)
    after = [min(offset, total - side) for offset in range(stop - side + step, total - side + step, step)]
    before = [max(offset, 0) for offset in range(start - step, -step, -step)]
    return [*after, *before]


# ------------------------------------------------------------------------------ pictures given


def _listed(value: Any, requests: Requests, name: str) -> list[Any]:
    """One for each prompt."""
    prompts = len(requests) // requests.images_per_prompt
    is_box = name == "mask_image" and isinstance(value, list | tuple) and not any(map(_is_mask, value))
    values = value if isinstance(value, list | tuple) and not is_box else [value] * prompts
    if len(values) == 1:
        values = list(values) * prompts
    if len(values) != prompts:
        raise ValueError(f"{name} has {len(values)} entries for {prompts} prompts; give one, or one a prompt.")
    return list(values)


def _is_mask(value: Any) -> bool:
    """Whether it is a whole mask, or none, and not a side of a box; a path is."""
    return not np.isscalar(value) or isinstance(value, str)


def _open_images(image: Any, requests: Requests) -> list[Image.Image]:
    return [_open(one, "image") for one in _listed(image, requests, "image")]


def _open(image: Any, name: str) -> Image.Image:
    """An upright RGB picture from a picture, an array or a path."""
    from muse_jax.data import transforms  # its room takes a while to import, and most calls have no picture

    if isinstance(image, np.ndarray):
        image = _from_array(image, name)
    elif not isinstance(image, Image.Image):
        try:
            image = transforms.open_image(os.fspath(image) if isinstance(image, os.PathLike) else image)
            image.load()
        except (transforms.UnusableError, OSError, TypeError, AttributeError) as error:
            raise ValueError(f"{name} {image!r} can't be read: {error}.") from error
    # Of strokes on nothing the strokes are repainted.
    return transforms.to_rgb(transforms.upright(image), paper="black" if name == "mask_image" else "white")


def _from_array(pixels: np.ndarray, name: str) -> Image.Image:
    if pixels.dtype == bool and name == "mask_image":
        pixels = pixels.astype(np.uint8) * 255
    flat = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels
    if flat.dtype != np.uint8 or flat.ndim not in (2, 3) or flat.shape[2:] not in ((), (3,), (4,)):
        raise ValueError(
            f"{name} is an array of {pixels.dtype} and shape {pixels.shape}; expected uint8 [h, w, 3] or [h, w]."
        )
    return Image.fromarray(flat)


def _mask(mask: Any, picture: Image.Image) -> Image.Image:
    """A grey picture of the image's size, white where it is repainted."""
    if isinstance(mask, np.ndarray) and mask.shape == (4,):
        mask = mask.tolist()
    if isinstance(mask, Sequence) and not isinstance(mask, str):
        return _box(mask, picture)
    mask = _open(mask, "mask_image").convert("L").point(lambda value: 255 * (value > 127))
    if mask.size != picture.size:
        raise ValueError(
            f"mask_image is {mask.size[0]} x {mask.size[1]} pixels and the image {picture.size[0]} x "
            f"{picture.size[1]}; draw the mask on a picture of the image's size."
        )
    return mask


def _box(box: Sequence[Any], picture: Image.Image) -> Image.Image:
    width, height = picture.size
    if len(box) != 4 or not all(isinstance(v, int | float | np.number) and np.isfinite(v) for v in box):
        raise ValueError(f"mask_image is {box!r}; expected a picture or a box (left, top, right, bottom).")
    left, top, right, bottom = (int(round(float(v))) for v in box)
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ValueError(
            f"the box {tuple(box)} doesn't lie within the image of {width} x {height} pixels; expected "
            "0 <= left < right <= width and 0 <= top < bottom <= height."
        )
    mask = Image.new("L", picture.size, 0)
    mask.paste(255, (left, top, right, bottom))
    return mask


def _square(picture: Image.Image, size: int) -> np.ndarray:
    from muse_jax.data import transforms

    return transforms.square(picture, size)


def _fitted_mask(mask: Image.Image, size: int, resize: bool) -> Bool[np.ndarray, "h w"]:
    """Which pixels of the picture, cut and resized as `_square` does it, have something white in them."""
    if not resize:
        return np.asarray(mask) > 0
    side = min(mask.size)
    left, top = ((edge - side) / 2 for edge in mask.size)
    # The mean of the pixels that fall together, as float: of a thousand a single white one counts.
    box = (left, top, left + side, top + side)
    return np.asarray(mask.convert("F").resize((size, size), Image.Resampling.BOX, box=box)) > 0


def _stacked(pictures: Sequence[np.ndarray]) -> np.ndarray:
    if len({picture.shape for picture in pictures}) > 1:
        raise ValueError("the images have different shapes after resizing; edit them one by one.")
    return np.stack(pictures)


def _as_it_is(picture: Image.Image, size: int, cell: int) -> np.ndarray:
    """The picture's own pixels."""
    if any(side % cell or side < size for side in picture.size):
        raise ValueError(
            f"the image is {picture.size[0]} x {picture.size[1]} pixels; with resize=False its sides must be "
            f"multiples of {cell} and at least {size}. Crop it, or let it be resized."
        )
    return np.asarray(picture)


def _whole_cells(picture: Image.Image, size: int, cell: int) -> np.ndarray:
    """The shorter side resized to `size`; of the longer one, the middle that is whole cells."""
    scale = size / min(picture.size)
    sides = [max(size, int(side * scale / cell + 0.5) * cell) for side in picture.size]
    box = [(side - want / scale) / 2 for side, want in zip(picture.size, sides, strict=True)]
    left, top = (max(0.0, edge) for edge in box)
    area = (left, top, picture.size[0] - left, picture.size[1] - top)
    return np.asarray(picture.resize(sides, Image.Resampling.BICUBIC, box=area, reducing_gap=3.0))
