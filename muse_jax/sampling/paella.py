"""`PaellaPipeline`: pictures from Paella's token predictor, and what its paper shows it do with them.

Rampas et al. 2022 (arXiv 2211.07292), section 4. All of it is one call of the decode loop on a canvas of any size:
what differs is which places are known, how much of the canvas is noise at the start, and which prompts a place has.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image

from muse_jax.models import predictors
from muse_jax.sampling import editing, guidance, sampler, schedules, selection
from muse_jax.sampling.folder import PipelineError
from muse_jax.sampling.output import OUTPUT_TYPES, MuseOutput
from muse_jax.sampling.pipeline import PER_PICTURE, MusePipeline, Way, _joined, _padded, _plain, _run, any_guided
from muse_jax.sampling.requests import Requests, Some, list_of_texts

STRENGTH = 2 / 3  # of structural editing; the paper's code: 24 steps, of which it leaves out the first 8


@dataclasses.dataclass(frozen=True)
class Canvas:
    """What the loop starts from, for n pictures.

    Attributes:
      tokens: of what is given.
      open: which of them may change.
      strength: 1: where it is open all is noise at the start; less: as much as the model saw later on.
      texts: p prompts of each picture; None: the request's.
      shares: of the prompts in each place; None of one prompt.
      pictures: tokens of pictures to make others like, instead of a prompt.
    """

    tokens: Int[np.ndarray, "n r c"]
    open: Bool[np.ndarray, "n r c"]
    strength: float = 1.0
    texts: tuple[tuple[str, ...], ...] | None = None
    shares: Float[np.ndarray, "n r c p"] | None = None
    pictures: Int[np.ndarray, "n m"] | None = None


class PaellaPipeline(MusePipeline):
    """A tokenizer and a Paella model: prompt to picture, of any height and width.

    Calls take `height` and `width` in pixels, too: multiples of `cell`. Inpainting and outpainting are those of
    `MusePipeline`, in one pass whatever the size.
    """

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
        strength: float | int = STRENGTH,
        blend: bool = True,
        resize: bool = True,
        history: bool = False,
        **settings: Any,
    ) -> MuseOutput:
        """Structural editing: a prompt's picture with the structure of a given one.

        Decoding starts late, from the picture's tokens with as many of them noise as there would be by then; places
        that are renoised go back to that start (the paper's code: to the step before).

        Args:
          image: see `editing.Editing`.
          mask_image: if given, tokens outside the white part stay.
          strength: from 0, which gives the picture back, to 1, which ignores it.
          blend, resize: as in `inpaint`.

        Raises:
          ValueError, TypeError: naming the argument, before anything is compiled.
        """
        if isinstance(strength, bool) or not isinstance(strength, int | float | np.number) or not 0 <= strength <= 1:
            raise ValueError(f"strength is {strength!r}; expected 0 (keeps the image) to 1 (ignores it).")
        given = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps, **settings}
        requests = self._requests(prompt, negative_prompt, num_images_per_prompt, seed)
        canvas = self._given(image, mask_image, requests, resize).repeated(requests.images_per_prompt)
        canvas = dataclasses.replace(canvas, repaint=canvas.repaint & (strength > 0))
        return self._paint(requests, canvas, given, output_type, blend, history, float(strength))

    def variations(
        self,
        image: Any,
        guidance_scale: Some = None,
        num_inference_steps: Any = None,
        num_images_per_prompt: Any = 4,
        seed: Some = 0,
        output_type: str = "pil",
        *,
        history: bool = False,
        **settings: Any,
    ) -> MuseOutput:
        """Other pictures of what a picture shows: its vector takes the place of a prompt's.

        Args:
          image: see `editing.Editing`.

        Raises:
          PipelineError: if the model was trained without an encoder of pictures.
        """
        if not self.stages["base"].spec.model.picture_encoder:
            raise PipelineError(
                "variations need a model that was trained on vectors of pictures, and this one was not; train one "
                "with model.picture_encoder=True and task.picture_share above 0."
            )
        requests = self._requests("", None, num_images_per_prompt, seed)
        (picture,) = editing._open_images(image, requests)
        tokens = self.encode("tokenizer_low", editing._square(picture, self.image_size)[None].astype(np.float32))
        canvas = self._blank(len(requests), *self.grid("base"))
        canvas = dataclasses.replace(canvas, pictures=np.repeat(tokens.reshape(1, -1), len(requests), axis=0))
        given = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps, **settings}
        return self._call(requests, given, output_type, history, canvas)

    def compose(
        self,
        prompt: Sequence[str],
        regions: Sequence[Any] | None = None,
        negative_prompt: str | None = None,
        guidance_scale: Some = None,
        num_inference_steps: Any = None,
        num_images_per_prompt: int = 1,
        seed: Some = 0,
        output_type: str = "pil",
        *,
        history: bool = False,
        **settings: Any,
    ) -> MuseOutput:
        """One picture of several prompts, each for a region of its own.

        Args:
          prompt: two or more.
          regions: for each prompt a box (left, top, right, bottom) or a mask [h, w], in pixels of the picture, which
            `height` and `width` may make larger. Where they overlap prompts share the place; where there is none
            all do. None: columns of equal width, from the left.
          num_images_per_prompt: pictures, with seeds seed, seed + 1, ...
        """
        texts = list_of_texts(prompt)
        if len(texts) < 2:
            raise ValueError("regions are for several prompts; give two or more.")
        rows, columns = self._canvas_grid(settings)
        if regions is None:
            regions = _columns(len(texts), columns * self.cell, rows * self.cell)
        if len(regions) != len(texts):
            raise ValueError(f"{len(regions)} regions are given for {len(texts)} prompts; give one for each prompt.")
        page = Image.new("L", (columns * self.cell, rows * self.cell))
        inside = np.stack([np.asarray(editing._mask(region, page)) > 0 for region in regions])
        covered = inside.reshape(len(texts), rows, self.cell, columns, self.cell).mean(axis=(2, 4))
        for text, share in zip(texts, covered, strict=True):
            if not share.any():
                raise ValueError(f"the region of {text!r} is empty; make it larger.")
        shares = np.moveaxis(np.where(covered.sum(axis=0) > 0, covered, 1.0), 0, -1)
        shares = (shares / shares.sum(axis=-1, keepdims=True)).astype(np.float32)
        requests = self._requests(" | ".join(texts), negative_prompt, num_images_per_prompt, seed)
        count = len(requests)
        canvas = dataclasses.replace(
            self._blank(count, rows, columns),
            texts=tuple((text,) * count for text in texts),
            shares=np.broadcast_to(shares, (count, *shares.shape)),
        )
        given = {"guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps, **settings}
        return self._call(requests, given, output_type, history, canvas)

    # ----------------------------------------------------------------------------------- parts

    def _interpolate(
        self, requests: Requests, way: Way, given: Mapping[str, Any], output_type: str, history: bool
    ) -> MuseOutput:
        given = dict(given)
        blank = self._blank(len(requests), *self._canvas_grid(given))
        shares = np.stack([1 - way.weights, way.weights], axis=-1)[:, None, None]
        canvas = dataclasses.replace(blank, texts=way.texts, shares=np.broadcast_to(shares, (*blank.tokens.shape, 2)))
        return self._call(requests, given, output_type, history, canvas)

    def _paint(
        self,
        requests: Requests,
        canvas: editing.Canvas,
        given: Mapping,
        output_type: str,
        blend: bool,
        history: bool,
        strength: float = 1.0,
    ) -> MuseOutput:
        """All that is open in given pictures, at once."""
        tokens = self._tokens(canvas)
        originals = self._originals(canvas, tokens) if blend else None
        start = Canvas(tokens["base"].ids, tokens["base"].open, strength)
        return dataclasses.replace(self._call(requests, given, output_type, history, start), originals=originals)

    def _blank(self, count: int, rows: int, columns: int) -> Canvas:
        return Canvas(np.zeros((count, rows, columns), np.int32), np.ones((count, rows, columns), bool))

    def _canvas_grid(self, settings: dict[str, Any]) -> tuple[int, int]:
        """Rows and columns of tokens for the `height` and `width` in the settings, which it takes out."""
        grid = []
        least = self.cell * 2 ** len(self.stages["base"].spec.model.widths)
        for name, usual in zip(("height", "width"), self.grid("base"), strict=True):
            value = settings.pop(name, None)
            pixels = usual * self.cell if value is None else value
            if isinstance(pixels, bool) or not isinstance(pixels, int | np.integer) or pixels % self.cell:
                raise ValueError(f"{name} is {pixels!r}; expected a multiple of {self.cell} pixels.")
            if pixels < least:
                raise ValueError(f"{name} is {pixels}; this model's smallest pictures have {least} pixels a side.")
            grid.append(int(pixels) // self.cell)
        return grid[0], grid[1]

    def _call(
        self,
        requests: Requests,
        given: Mapping[str, Any],
        output_type: str,
        history: bool,
        loops: Canvas | None = None,
    ) -> MuseOutput:
        """The decode loop, of an empty canvas or of the one given."""
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; expected one of {', '.join(map(repr, OUTPUT_TYPES))}.")
        given = dict(given)
        canvas = self._blank(len(requests), *self._canvas_grid(given)) if loops is None else loops
        resolved = self._settings(given, requests)
        texts = (requests.prompts,) if canvas.texts is None else canvas.texts
        self._warn(dataclasses.replace(requests, prompts=sum(texts, ())), resolved)
        pieces = [
            self._draw(requests, texts, resolved["base"], canvas, slice(start, start + self.max_batch_size), history)
            for start in range(0, len(requests), self.max_batch_size)
        ]
        tokens = np.concatenate([made for made, _ in pieces])
        return MuseOutput(
            prompts=requests.prompts,
            negative_prompts=requests.negative_prompts,
            seeds=requests.seeds,
            tokens=tokens,
            low_tokens=tokens,
            settings={"base": _plain(resolved["base"])},
            output_type=output_type,
            decode=self.decode_tokens,
            best="decoder" if "decoder" in self.stages else self.finest,
            finest=self.finest,
            steps={"base": _joined([steps for _, steps in pieces])} if history else None,
        )

    def _draw(
        self,
        requests: Requests,
        texts: Sequence[Sequence[str]],
        settings: Mapping[str, Any],
        canvas: Canvas,
        piece: slice,
        history: bool,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """One batch: tokens [n, rows, columns] and, with `history`, every step's predictions and masks."""
        spec = self.stages["base"].spec
        count, (rows, columns) = len(requests.prompts[piece]), canvas.tokens.shape[1:]
        bucket = self._bucket(count)
        own = {k: _padded(v[piece], bucket) if k in PER_PICTURE else v for k, v in settings.items()}
        start_time = min(1 - canvas.strength, 0.999)  # nothing is open at strength 0
        plan = sampler.make_plan(tokens=rows * columns, grid=(rows, columns), start_time=start_time, **own)
        open_ = canvas.open[piece].reshape(count, -1)
        share = schedules.masked_share(own["schedule"], start_time, np.float64(rows * columns))
        noised = np.ceil(open_.sum(axis=1) * share - 1e-9).astype(np.int32)
        branches = [[text[piece] for text in texts], [requests.negative_prompts[piece]] * len(texts)]
        encoded = [self._encoded(branch, spec.condition_length, bucket) for branch in branches]
        ids, mask = (np.concatenate([branch[i] for branch in encoded]) for i in range(2))
        tokens, steps = _run(
            _renoise,
            self._params["base"],
            ids,
            mask,
            *(_row(x, piece, bucket) for x in (canvas.pictures, canvas.shares, canvas.tokens, ~canvas.open)),
            _padded(noised, bucket),
            _padded(np.asarray(requests.seeds[piece], np.uint32), bucket),
            plan,
            any_guided(settings),
            spec=dataclasses.replace(spec.model, grid=(rows, columns)),
            guided=self._guided("base"),
            history=history,
        )
        kept = (steps.predicted, steps.masked) if history else ()
        shaped = tuple(x[:, :count].reshape(-1, count, rows, columns) for x in kept)
        return tokens[:count].reshape(count, rows, columns), shaped

    def _encoded(self, texts: Sequence[Sequence[str]], length: int, bucket: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask [bucket * p, t] of p prompts a picture, those of a picture beside each other."""
        encoded = [self._vocabularies["base"].encode_batch(text, length) for text in texts]
        padded = (np.stack([_padded(text[i], bucket) for text in encoded], axis=1) for i in range(2))
        ids, mask = (x.reshape(-1, x.shape[-1]) for x in padded)
        return ids, mask


@partial(jax.jit, static_argnames=("spec", "guided", "history"))
def _renoise(
    params,
    text_ids,
    text_mask,
    pictures,
    shares,
    tokens,
    known,
    noised,
    seeds,
    plan,
    guides,
    *,
    spec,
    guided: bool,
    history: bool,
):
    """Paella's sampler; the texts are [prompts; negative prompts]."""
    apply = partial(predictors.from_spec(spec).apply, {"params": params})
    keys = jax.vmap(jax.random.key)(seeds)
    noise = sampler.noise(keys, tokens.shape[1], spec.codebook_size)
    start = jnp.where(jax.vmap(_chosen)(keys, known, noised), noise, tokens)

    if pictures is not None:
        pictures = jnp.stack([pictures, jnp.full_like(pictures, spec.codebook_size)])

    def condition(ids, mask, pictures):
        told = apply(apply(ids, mask, method="encode_text"), mask, pictures, method="condition")
        if shares is None:
            return told
        return told.grouped(jnp.concatenate([shares] * (len(ids) // (shares.shape[0] * shares.shape[-1]))))

    def logits(tokens, told, t):
        return apply(tokens, told, t, method="logits")

    if guided:
        told = condition(text_ids, text_mask, None if pictures is None else jnp.concatenate(pictures))
        predict = guidance.guided(lambda tokens, t: logits(tokens, told, t), timed=True)
    else:
        branches = (*(x.reshape(2, -1, x.shape[-1]) for x in (text_ids, text_mask)), pictures)
        predict = guidance.optional(condition, logits, spec.codebook_size, branches, guides, timed=True)
    return sampler.decode(predict, start, plan, keys, start, known=known, revisable=True, history=history)


def _chosen(key: jax.Array, known: jax.Array, count: jax.Array) -> jax.Array:
    """So many of the places that aren't known, at random."""
    chance = jax.random.uniform(jax.random.fold_in(key, 2**31 - 2), known.shape)
    return selection.lowest(jnp.where(known, jnp.inf, chance), count)


def _row(values: Any, piece: slice, bucket: int) -> Any:
    """A batch's part of what there is for each picture, its places in one row."""
    if values is None:
        return None
    part = values[piece]
    places = part.reshape(len(part), -1, *part.shape[3:])
    return _padded(places, bucket)


def _columns(count: int, width: int, height: int) -> list[tuple[int, int, int, int]]:
    """Boxes beside each other that together have the whole picture."""
    edges = [round(width * i / count) for i in range(count + 1)]
    return [(left, 0, right, height) for left, right in zip(edges, edges[1:], strict=False)]
