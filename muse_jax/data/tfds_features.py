"""The features of a TFDS data set: which there are, and their values as texts.

Nothing here imports TensorFlow.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image


class Features:
    """Looks features up by the config's keys, and says what there is where a key is wrong."""

    def __init__(self, builder: Any):
        self._name = builder.info.name
        self._features = builder.info.features

    def listed(self) -> str:
        """All features with their types, for messages."""
        return "It has the features " + ", ".join(sorted(f"{key} ({kind(f)})" for key, f in flat(self._features))) + "."

    def image(self, key: str) -> Any:
        """The feature of pictures.

        Raises:
          ValueError: if there is none of this name, or it is no picture, or several of an example.
        """
        from tensorflow_datasets import features

        feature = self._feature(key, "image_key", (features.Image,))
        held = self._features
        for part in key.split("/"):
            held = inner(held)[part]
            if isinstance(held, features.Sequence):
                raise ValueError(f"data.image_key is {key!r}, a sequence; expected one picture. {self.listed()}")
        return feature

    def text(self, key: str) -> Any:
        """The feature of captions or labels; raises as `image` does."""
        from tensorflow_datasets import features

        return self._feature(key, "text_key", (features.Text, features.ClassLabel))

    def _feature(self, key: str, name: str, kinds: tuple[type, ...]) -> Any:
        feature = dict(flat(self._features)).get(key)
        if feature is None:
            raise ValueError(f"data.{name} is {key!r}, which {self._name} lacks. {self.listed()}")
        if not isinstance(inner(feature), kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"data.{name} is {key!r}, of type {kind(feature)}; expected {wanted}. {self.listed()}")
        return feature


def flat(features: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("captions/text", feature) of every feature; what is within a sequence is listed as such."""
    for key, feature in features.items():
        held = inner(feature)
        if hasattr(held, "items"):
            yield from flat(held, f"{prefix}{key}/")
        else:
            yield prefix + key, feature


def inner(feature: Any) -> Any:
    """A sequence's feature, else the feature itself."""
    return feature.feature if hasattr(feature, "feature") else feature


def kind(feature: Any) -> str:
    """The type of a feature, or of what a sequence holds."""
    return type(inner(feature)).__name__


def get(record: Mapping[str, Any], key: str) -> Any:
    """The value of "feature/inner" in an example."""
    for part in key.split("/"):
        record = record[part]
    return record


def nested(key: str, value: Any) -> dict[str, Any]:
    """{"feature": {"inner": value}}, where `get` finds the value by "feature/inner"."""
    for part in reversed(key.split("/")):
        value = {part: value}
    return value


def is_many(value: Any) -> bool:
    """Whether this is a sequence's value."""
    return isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim > 0)


def as_text(feature: Any, value: Any) -> str:
    """A text, or the name of a label; "" of the label -1, by which TFDS says that there is none."""
    if hasattr(feature, "int2str"):
        return feature.int2str(int(value)).replace("_", " ") if int(value) >= 0 else ""
    value = value.item() if isinstance(value, np.ndarray) else value
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def as_image(values: np.ndarray) -> Image.Image:
    """An array [h, w, c] of whatever type as a Pillow image; floats are in [0, 1]."""
    if values.dtype.kind == "f":
        values = np.clip(values * 255 + 0.5, 0, 255).astype(np.uint8)
    if values.shape[-1] == 1:
        return Image.fromarray(values[..., 0])
    if values.dtype != np.uint8:
        values = (values.astype(np.float32) * (255 / 65535) + 0.5).astype(np.uint8)
    return Image.fromarray(values)
