"""The generated scenes as a source; see `muse_jax.data.make_source`."""

from collections.abc import Iterator, Sequence
from typing import Any

from muse_jax.data import scenes
from muse_jax.specs import DataSpec


class SceneSource:
    """Scenes of a split, made when they are asked for.

    Args:
      spec: `image_size` and the names of the splits are read ("train", "test" or "held_out"). With `vocabulary`
        "classes" scenes have one object and its label.
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
        self._labelled = spec.vocabulary == "classes"

    def __len__(self) -> int:
        return scenes.SPLITS[self._split]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {key: values[0] for key, values in self.batch([index]).items()}

    def batch(self, indices: Sequence[int], seeds: Sequence[tuple[int, ...]] | None = None) -> dict[str, Any]:
        """Pictures and captions, and labels if there are classes, of many scenes at once."""
        del seeds  # nothing is cropped
        made = (scenes.single_objects if self._labelled else scenes.scenes)(indices, split=self._split)
        labels = {"label": [scenes.label(scene) for scene in made]} if self._labelled else {}
        return {"image": scenes.render_batch(made, self._size), "text": [scene.caption for scene in made], **labels}

    def captions(self) -> Iterator[str]:
        """All the captions' words, as one caption: there are too many scenes to read them."""
        return iter([" ".join(scenes.WORDS)])

    def class_names(self) -> list[str]:
        """Colour and shape."""
        return [" ".join(pair) for pair in scenes.CLASSES]

    def fingerprint(self) -> str:
        """Changes with what the scenes show."""
        kind = "single_objects:" if self._labelled else ""
        return f"scenes:{scenes.VERSION}:{kind}{self._split}:{len(self)}"
