"""Precomputed tokens and text embeddings as a source; see `muse_jax.data.make_source`."""

from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from muse_jax.data import array_records
from muse_jax.data.reading import Reader
from muse_jax.specs import DataSpec

EMBEDDINGS, MASK = "text_embeddings", "text_mask"
DTYPES = {
    "uint16": np.uint16,
    "int32": np.int32,
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
}


def pack(example: Mapping[str, np.ndarray], text: str, features: Mapping[str, Any], label: int | None = None) -> bytes:
    """A record of tokens. Of embeddings only those of the text, without padding.

    Args:
      example: `low_tokens`, `high_tokens` [n], and `text_embeddings` [t, d] with `text_mask` [t] if asked for.
      features: {name: {"dtype": ..., "shape": ...}} of those.
      label: if there is one.
    """
    record: dict[str, Any] = {"text": text} | ({} if label is None else {"label": label})
    for name, feature in features.items():
        values = example[name]
        if name == EMBEDDINGS:
            values = values[: int(example[MASK].sum())]
        record[name] = np.ascontiguousarray(values, DTYPES[feature["dtype"]]).tobytes()
    return array_records.pack(record)


class PrecomputedSource:
    """The examples of a folder that `muse_jax.precompute` wrote.

    Epoch e of a run reads what was made of epoch e modulo the number of epochs that were made, so that it
    sees the crops that the run would have made itself.

    Args:
      spec: `path`, `text_length` and `text_embeddings` are read.
      split: "train" or "eval".

    Attributes:
      key: what the tokens were made with: tokenizers, crops, texts.
      seed: of the run whose crops, flips and captions they are.
      features: {name: {"dtype": ..., "shape": ...}} of what a record has.
      vocabulary: that of the data's captions, as JSON, of which the records have those that were drawn; None where
        the config named another, and in manifests that were written without one.

    Raises:
      ValueError: if the folder is no whole one, or has no text embeddings where the spec wants them.
    """

    def __init__(self, spec: DataSpec, split: str = "train"):
        self._spec = spec
        self._name = f"{spec.path}, split {split!r}"
        folder, manifest = array_records.read_manifest(spec.path, "tokens")
        self._shards = array_records.shards_of(folder, manifest, split)
        self._records = array_records.open_shards(folder, self._shards)
        self._epochs = manifest["epochs"][split]
        self.features: dict[str, Any] = manifest["features"]
        self.seed: int = manifest["seed"]
        self.key: dict[str, Any] = manifest["key"]
        self.vocabulary: dict[str, Any] | None = manifest.get("vocabulary")
        if spec.text_embeddings and EMBEDDINGS not in self.features:
            raise ValueError(
                f"{spec.path} has no text embeddings; precompute them with --text_embeddings, or set "
                "data.text_embeddings=False to compute them while training."
            )
        self._reader = Reader(
            self._read, length=len(self._records), most_broken=spec.most_broken, name_of=self._name_of, fixed=False
        )

    def __len__(self) -> int:
        return len(self._records) // self._epochs

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.example(index, (index,))

    def example(self, index: int, seed: tuple[int, ...]) -> dict[str, Any]:
        """Tokens and text, or text embeddings; the example id, which ends the seed, says of which epoch."""
        return self._reader.example(seed[-1] // len(self) % self._epochs * len(self) + index, seed)

    def _name_of(self, position: int) -> str:
        return f"record {position} of {self._name}"

    def _read(self, position: int, seed: tuple[int, ...]) -> dict[str, Any]:
        del seed  # nothing is left to draw
        record = array_records.read(self._records, position)
        made: dict[str, Any] = {}
        for name, feature in self.features.items():
            if name != EMBEDDINGS:
                made[name] = self._array(record, name).astype(np.int32)
            elif self._spec.text_embeddings:
                made |= self._embeddings(self._array(record, name).reshape(-1, feature["shape"][-1]))
        if not self._spec.text_embeddings:
            made["text"] = record["text"]
        return made | ({"label": record["label"]} if "label" in record else {})

    def _array(self, record: Mapping[str, Any], name: str) -> np.ndarray:
        return np.frombuffer(record[name], DTYPES[self.features[name]["dtype"]])

    def _embeddings(self, values: np.ndarray) -> dict[str, np.ndarray]:
        length = self._spec.text_length
        padded = np.zeros((length, values.shape[1]), values.dtype)
        padded[: len(values)] = values
        return {EMBEDDINGS: padded, MASK: np.arange(length) < len(values)}

    def captions(self) -> Iterator[str]:
        """Every caption of the first epoch."""
        return (array_records.read(self._records, index)["text"] for index in range(len(self)))

    def fingerprint(self) -> str:
        """Changes with any token, text or embedding; not with where the folder lies."""
        return f"precomputed:{array_records.fingerprint(self._shards)}"
