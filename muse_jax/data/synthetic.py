"""Random pictures and captions that cost almost nothing, to measure speed without a data set."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from muse_jax.specs import DataSpec

_LENGTH = 1_000_000
_POOL = 64  # different pictures
_CLASSES = 1000


class SyntheticSource:
    """Noise pictures with random captions and labels; see `muse_jax.data.make_source`.

    Captions are as long as `spec.text_length`, so that no position of a batch is padding.
    """

    def __init__(self, spec: DataSpec, split: str = "train"):
        self._size = spec.image_size
        self._seed = 1 if split == "eval" else 0
        self._characters = max(spec.text_length - 1, 1)  # bytes end with one more id

    @functools.cached_property
    def _pool(self) -> np.ndarray:
        return np.random.default_rng(self._seed).integers(0, 256, (_POOL, self._size, self._size, 3), np.uint8)

    @functools.cached_property
    def _texts(self) -> list[str]:
        letters = np.random.default_rng(self._seed + 2).integers(97, 123, (_POOL, self._characters), np.uint8)
        return [row.tobytes().decode("ascii") for row in letters]

    def __len__(self) -> int:
        return _LENGTH

    def __getitem__(self, index: int) -> dict[str, Any]:
        made = self.batch([index])
        return {"image": made["image"][0], "text": made["text"][0], "label": int(made["label"][0])}

    def batch(self, indices: Sequence[int], seeds: Sequence[tuple[int, ...]] | None = None) -> dict[str, Any]:
        """Pictures, captions and labels of many examples at once."""
        del seeds
        at = np.asarray(indices, np.int64)
        pool = at % _POOL
        return {
            "image": self._pool[pool],
            "text": [self._texts[i] for i in pool],
            "label": (at % _CLASSES).astype(np.int32),
        }

    def class_names(self) -> list[str]:
        """A name for each label."""
        return [f"class {i}" for i in range(_CLASSES)]

    def captions(self) -> Iterator[str]:
        """Every different caption."""
        return iter(self._texts)

    def fingerprint(self) -> str:
        """Always the same."""
        return "synthetic"
