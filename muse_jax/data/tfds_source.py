"""Any TFDS data set with an image and a text or label feature, through `tfds.data_source`.

Nothing here imports TensorFlow. TFDS itself does where it downloads and prepares a data set, which
happens at the first use of one that is not in the data directory yet.
"""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np

from muse_jax.data import tfds_features, transforms
from muse_jax.data.reading import Reader
from muse_jax.specs import DataSpec


class TFDSSource:
    """The examples of a TFDS split, by index; see `muse_jax.data.make_source`.

    A label's name, with spaces for underscores, is its text. Of several captions of a picture the
    example's seed chooses one. The label is in the examples too, if it is the text, or if the data set has
    just one label feature.

    Args:
      spec: `dataset`, `path` (the data_dir; empty is TFDS's own), `split` and `eval_split` (slices such as
        "train[:90%]" too), `image_key` and `text_key` (features of a feature as "captions/text") are read.
      split: "train" or "eval".

    Raises:
      ValueError: if a key is wrong (lists the data set's features), or the data were prepared in a
        format without random access.
    """

    def __init__(self, spec: DataSpec, split: str = "train"):
        import tensorflow_datasets as tfds  # late: only this source needs it

        if not spec.dataset:
            raise ValueError("data.dataset is empty; name a TFDS data set, such as 'cifar10'.")
        self._spec = spec
        self._split = spec.eval_split if split == "eval" else spec.split
        directory = spec.path or None
        try:
            builder = tfds.builder(spec.dataset, data_dir=directory)
        except tfds.core.DatasetNotFoundError as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(f"data.dataset {spec.dataset!r} is not in {directory or 'TFDS'}: {first}") from error
        self._features = builder.info.features
        features = tfds_features.Features(builder)
        self._image = features.image(spec.image_key)
        self._text = None
        if spec.text_key:
            self._text = features.text(spec.text_key)
        elif spec.text_length:
            raise ValueError(f"data.text_key is empty; name the feature with the captions. {features.listed()}")
        self._label_key = self._find_label(tfds.features.ClassLabel)
        if spec.vocabulary == "classes" and not self._label_key:
            raise ValueError(f"data.vocabulary is 'classes'; name the label with data.text_key. {self._listed()}")
        # Encoded pictures are decoded here, with what is known of odd files; other types by TFDS.
        self._encoded = np.dtype(self._image.np_dtype) == np.uint8 and "/" not in spec.image_key
        decoders = {spec.image_key: tfds.decode.SkipDecoding()} if self._encoded else None
        self._data = self._open(tfds, decoders, directory)
        self._name = f"{builder.info.full_name}/{self._split}"
        # One of several captions is drawn by the seed, as crops and flips are.
        many = hasattr(self._text, "feature") or "/" in spec.text_key
        fixed = spec.crop == "center" and not spec.flip and not many
        self._reader = Reader(
            self._read, length=len(self), most_broken=spec.most_broken, name_of=self._name_of, fixed=fixed
        )

    def _open(self, tfds: Any, decoders: Any, directory: str | None) -> Any:
        try:
            return tfds.data_source(self._spec.dataset, split=self._split, data_dir=directory, decoders=decoders)
        except NotImplementedError as error:
            raise ValueError(
                f"{self._spec.dataset} is prepared in a format without random access; prepare it again with "
                "`tfds build ... --file_format=array_record`, or choose another data.path."
            ) from error
        except (KeyError, ValueError) as error:  # an unknown split or slice
            raise ValueError(f"data.split {self._split!r} of {self._spec.dataset} cannot be read: {error}") from error

    def _find_label(self, kind: type) -> str:
        if isinstance(self._text, kind) and "/" not in self._spec.text_key:
            return self._spec.text_key
        features = tfds_features.flat(self._features)
        labels = [key for key, feature in features if isinstance(feature, kind) and "/" not in key]
        return labels[0] if len(labels) == 1 else ""

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.example(index, (index,))

    def example(self, index: int, seed: tuple[int, ...]) -> dict[str, Any]:
        """The picture, text and label of an example; `seed` draws the crop, the flip and the caption."""
        return self._reader.example(index, seed)

    def _name_of(self, index: int) -> str:
        return f"example {index} of {self._name}"

    def _read(self, index: int, seed: tuple[int, ...]) -> dict[str, Any]:
        record = self._data[index]
        made = {"image": self._pixels(tfds_features.get(record, self._spec.image_key), seed)}
        if self._text is not None:
            made["text"] = self._caption(tfds_features.get(record, self._spec.text_key), seed)
        if self._label_key:
            made["label"] = int(tfds_features.get(record, self._label_key))
        return made

    def _pixels(self, value: Any, seed: tuple[int, ...]) -> np.ndarray:
        spec = self._spec
        crop = {"crop": spec.crop, "flip": spec.flip, "seed": seed}
        if self._encoded:
            return transforms.decode(io.BytesIO(value), spec.image_size, **crop)
        image = transforms.to_rgb(tfds_features.as_image(np.asarray(value)))
        return transforms.crop_of_example(image, spec.image_size, **crop)

    def _caption(self, value: Any, seed: tuple[int, ...]) -> str:
        if tfds_features.is_many(value):
            if len(value) == 0:
                return ""
            value = value[int(np.random.default_rng((*seed, 1)).integers(len(value)))]
        return tfds_features.as_text(tfds_features.inner(self._text), value)

    def captions(self) -> Iterator[str]:
        """Every caption of the split; of labels, the names."""
        inner = tfds_features.inner(self._text)
        if hasattr(inner, "int2str"):
            return (tfds_features.as_text(inner, i) for i in range(inner.num_classes))
        values = (tfds_features.get(self._data[i], self._spec.text_key) for i in range(len(self)))
        lists = (value if tfds_features.is_many(value) else [value] for value in values)
        return (tfds_features.as_text(inner, value) for values in lists for value in values)

    def class_names(self) -> list[str]:
        """The labels' names, with spaces for underscores."""
        label = self._features[self._label_key]
        return [tfds_features.as_text(label, i) for i in range(label.num_classes)]

    def fingerprint(self) -> str:
        """Name, configuration and version of the data set, the split, its number of examples and the keys read."""
        keys = {key: getattr(self._spec, key) for key in ("image_key", "text_key")}
        other = "".join(f":{key}={value}" for key, value in keys.items() if value != getattr(DataSpec, key))
        return f"tfds:{self._name}:{len(self)}{other}"
