"""The generated scenes as a source; see `muse_jax.data.make_source`."""

from collections.abc import Iterator, Sequence
from typing import Any

from muse_jax.data import scenes
from muse_jax.specs import DataSpec


class SceneSource:
    """Scenes of a split, made when they are asked for.

    Args:
      spec: `image_size` and the names of the splits are read ("train", "test" or "held_out").
      split: "train" or "eval".

    Raises:
      ValueError: if there is no such split, or `spec.flip` is set.
    """

    def __init__(self, spec: DataSpec, split: str = "train"):
        self._split = spec.eval_split if split == "eval" else spec.split
        if self._split not in scenes.SPLITS:
            raise ValueError(
                f"data.{'eval_split' if split == 'eval' else 'split'} is {self._split!r}; "
                f"scenes have {', '.join(map(repr, scenes.SPLITS))}."
            )
        if spec.flip:
            raise ValueError("data.flip is set, but scenes' captions say left and right; set data.flip=False.")
        self._size = spec.image_size

    def __len__(self) -> int:
        return scenes.SPLITS[self._split]

    def __getitem__(self, index: int) -> dict[str, Any]:
        made = self.batch([index])
        return {"image": made["image"][0], "text": made["text"][0]}

    def batch(self, indices: Sequence[int], seeds: Sequence[tuple[int, ...]] | None = None) -> dict[str, Any]:
        """Pictures and captions of many scenes at once."""
        del seeds  # nothing is cropped
        made = scenes.scenes(indices, split=self._split)
        return {"image": scenes.render_batch(made, self._size), "text": [scene.caption for scene in made]}

    def captions(self) -> Iterator[str]:
        """All the captions' words, as one caption: there are too many scenes to read them."""
        return iter([" ".join(scenes.WORDS)])

    def fingerprint(self) -> str:
        """Changes with what the scenes show."""
        return f"scenes:{scenes.VERSION}:{self._split}:{len(self)}"
