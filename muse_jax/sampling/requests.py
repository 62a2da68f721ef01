"""What a call of the pipeline asks for, spread out: one row for each picture to be made."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

Some = Any  # one value, or a sequence of them: checked here, with messages for those who type prompts


@dataclasses.dataclass(frozen=True)
class Requests:
    """One entry a picture: pictures of one prompt are neighbours."""

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    images_per_prompt: int

    def __len__(self) -> int:
        return len(self.prompts)

    def spread(self, name: str, value: Any) -> np.ndarray:
        """A setting as one number for each picture, from one number, one a prompt or one a picture.

        Raises:
          ValueError: naming the setting.
        """
        values = np.asarray(value)
        if values.dtype.kind not in "iuf":
            raise ValueError(f"{name} is {value!r}; expected a number or a list of numbers.")
        return np.asarray(_spread(name, values.astype(np.float64), len(self), self.images_per_prompt))


def make_requests(
    prompt: Some,
    negative_prompt: Some = None,
    num_images_per_prompt: Any = 1,
    seed: Some = 0,
) -> Requests:
    """Spreads prompts and seeds over the pictures to be made.

    Picture j of a prompt has seed + j, whichever prompt it is; a list of seeds gives one for each
    prompt or one for each picture. One negative prompt serves all prompts.

    Raises:
      ValueError, TypeError: naming what cannot be.

    >>> make_requests(["a", "b"], num_images_per_prompt=2, seed=7).seeds
    (7, 8, 7, 8)
    """
    prompts = _texts("prompt", prompt)
    if not prompts:
        raise ValueError("prompt is an empty list; give at least one prompt (it may be '').")
    if isinstance(num_images_per_prompt, bool) or not isinstance(num_images_per_prompt, int | np.integer):
        raise TypeError(f"num_images_per_prompt is {num_images_per_prompt!r}; expected a whole number.")
    if num_images_per_prompt < 1:
        raise ValueError(f"num_images_per_prompt is {num_images_per_prompt}; expected at least 1.")
    images = int(num_images_per_prompt)
    count = len(prompts) * images
    negative = _texts("negative_prompt", "" if negative_prompt is None else negative_prompt)
    if len(negative) == 1:
        negative = negative * len(prompts)
    return Requests(
        prompts=tuple(text for text in prompts for _ in range(images)),
        negative_prompts=tuple(_spread("negative_prompt", negative, count, images)),
        seeds=_seeds(seed, count, images),
        images_per_prompt=images,
    )


def _texts(name: str, value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, Sequence | np.ndarray) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} is {value!r}; expected a string or a list of strings.")
    return list(texts)


def _seeds(seed: Any, count: int, images: int) -> tuple[int, ...]:
    seeds = np.asarray(seed)
    if seeds.dtype.kind not in "iu" or seeds.ndim > 1:
        raise TypeError(f"seed is {seed!r}; expected a whole number or a list of them.")
    if seeds.ndim == 0 or (len(seeds) * images == count and len(seeds) != count):
        each = np.asarray(_spread("seed", seeds, count, images), np.int64) + np.tile(np.arange(images), count // images)
    else:
        each = np.asarray(_spread("seed", seeds, count, images), np.int64)
    if each.min() < 0 or each.max() >= 2**32:
        raise ValueError(f"seed is {seed!r}; expected 0 to 2**32 - 1 (one is added for each further picture).")
    return tuple(each.tolist())


def _spread(name: str, values: Any, count: int, images: int) -> Any:
    """Values for one, for each prompt or for each picture, as values for each picture."""
    if np.ndim(values) == 0:
        return np.full(count, values)
    if len(values) == count:
        return values
    if len(values) * images == count:
        return [value for value in values for _ in range(images)]
    raise ValueError(
        f"{name} has {len(values)} values for {count // images} prompts of {images} pictures; "
        "give one, one for each prompt, or one for each picture."
    )


def list_of_texts(prompt: Any) -> list[str]:
    """The prompts of one picture.

    Raises:
      TypeError: for one prompt alone, and for what is no text.
    """
    if isinstance(prompt, str):
        raise TypeError(f"prompt is {prompt!r}; expected a list of strings.")
    return _texts("prompt", prompt)
