"""T5 encoders from T5X checkpoints, read without T5X.

A checkpoint is a folder with one zarr array a parameter, named after its path
(`target.encoder.layers_0.attention.query.kernel`), and the file `checkpoint`, a msgpack tree that holds
the parameters which are not partitioned and says of the others that they are arrays. Only the encoder
of `target` is read: no decoder, no optimizer state.
"""

import asyncio
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from flax import serialization, traverse_util

from muse_jax.interop import folder, t5
from muse_jax.interop.tensors import WeightsError

_TREE = "checkpoint"
_NEWEST = 3  # version of the layout, since 2021
_ENCODER = ("token_embedder", "encoder")
_CODECS = (None, "gzip", "zlib", "zstd", "blosc", "bz2")
_DTYPES = ("<f8", "<f4", "<f2", "bfloat16")


def _name(ours: str, layer: int | None) -> str:
    inside = ours if layer is None else f"encoder/layers_{layer}/{ours}"
    return "target." + inside.replace("/", ".")


NAMES = t5.Names(name=_name, layer=re.compile(r"target\.encoder\.layers_(\d+)\."), transposed=lambda ours: False)


class _ZarrTensor:
    """One array of a checkpoint; of what is read, the chunks that hold it are read."""

    def __init__(self, place: epath.Path, name: str):
        import tensorstore

        self.name, self._where = name, f"{place}: {name}"
        self._store = _kvstore(place / name)
        self._check_description(place / name / ".zarray")
        spec = {"driver": "zarr", "kvstore": self._store, "fill_missing_data_reads": False}
        try:
            self._array = tensorstore.open(spec, read=True, open=True).result()
        except ValueError as error:
            raise WeightsError(f"{self._where} can't be opened: {str(error)[:300]}") from error
        self.shape = tuple(self._array.shape)
        self.ndim = len(self.shape)
        self.dtype = np.dtype(self._array.dtype.numpy_dtype)
        self._check_chunks()

    def _check_description(self, path: epath.Path) -> None:
        try:
            about = json.loads(path.read_text())
            codec, dtype = (about.get("compressor") or {}).get("id"), about["dtype"]
            self._separator = str(about.get("dimension_separator", "."))
        except (OSError, ValueError, KeyError, AttributeError, RecursionError) as error:
            raise WeightsError(f"{self._where} has no .zarray that can be read ({error}).") from error
        if codec not in _CODECS or about.get("filters") or dtype not in _DTYPES:
            raise WeightsError(
                f"{self._where} has the dtype {dtype!r}, compressor {codec!r} and filters {about.get('filters')!r}; "
                f"expected floats ({', '.join(_DTYPES)}), no filters and one of {', '.join(map(str, _CODECS))}."
            )

    def _check_chunks(self) -> None:
        """A chunk that isn't there would be read as zeros."""
        import tensorstore

        sizes = self._array.chunk_layout.read_chunk.shape
        counts = [-(-n // size) for n, size in zip(self.shape, sizes, strict=True)]
        keys = tensorstore.KvStore.open(self._store).result().list().result()
        found = {key.decode("utf-8", "replace") for key in keys if re.fullmatch(rb"\d+([./]\d+)*", key)}
        # No more than what is found and one: a shape that lies may ask for any number of chunks.
        expected = {self._separator.join(map(str, at)) or "0" for at in itertools.islice(_grid(counts), len(found) + 1)}
        for what, chunks in (("lacks", expected - found), ("has", found - expected)):
            if chunks:
                raise WeightsError(
                    f"{self._where} {what} the chunk {min(chunks)}: found {len(found)} chunks; expected "
                    f"{math.prod(counts)} for {self.shape}. It is truncated, or its files were renamed."
                )

    def __getitem__(self, index: Any) -> np.ndarray:
        try:
            return np.asarray(self._array[index].read().result())
        except (ValueError, asyncio.CancelledError) as error:
            raise WeightsError(f"{self._where} can't be read, it is damaged: {str(error)[:300]}") from error


def _grid(counts: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The places of a grid, one after another, as many as there may be."""
    for number in range(math.prod(counts)):
        place = []
        for count in reversed(counts):
            number, at = divmod(number, count)
            place.append(at)
        yield tuple(reversed(place))


class _HeldTensor:
    """A parameter that the msgpack tree itself holds."""

    def __init__(self, name: str, value: np.ndarray):
        self.name, self._value = name, value
        self.shape, self.ndim, self.dtype = value.shape, value.ndim, value.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        return self._value[index]


def _kvstore(place: epath.Path) -> dict[str, Any]:
    """Where a folder is, for TensorStore; the bucket written in the checkpoint is not used."""
    path = str(place)
    if path.startswith("gs://"):
        bucket, _, rest = path.removeprefix("gs://").partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": rest + "/"}
    return {"driver": "file", "path": path + "/"}


def convert(path: str) -> folder.Converted:
    """The encoder in a T5X checkpoint folder (the one that holds the file `checkpoint`).

    Raises:
      WeightsError: if it is none, another model's, or damaged; the message names the tensor.
    """
    place = epath.Path(path)
    target = _target(place)
    found: dict[str, Any] = {}
    for keys, value in traverse_util.flatten_dict(dict(target), keep_empty_nodes=True, is_leaf=_is_leaf).items():
        name = ".".join(("target", *map(str, keys)))
        if keys[0] not in _ENCODER:
            continue
        if isinstance(value, np.ndarray):
            found[name] = _HeldTensor(name, value)
        elif isinstance(value, Mapping) and "driver" in value:
            if "/" in name or not (place / name).is_dir():
                raise WeightsError(f"{path} lacks the tensor {name}; expected a folder of this name.")
            found[name] = _ZarrTensor(place, name)
        else:
            raise WeightsError(f"{path}: {name} is a {type(value).__name__}; expected an array.")
    return t5.convert(found, NAMES, path)


def _is_leaf(_: Any, value: Any) -> bool:
    return isinstance(value, Mapping) and {"driver", "kvstore"} <= value.keys()


def _target(place: epath.Path) -> Mapping[str, Any]:
    """The tree of the model's parameters."""
    if not (place / _TREE).exists():
        raise WeightsError(f"{place} has no file named {_TREE}; name the folder of one T5X checkpoint.")
    try:
        tree = serialization.msgpack_restore((place / _TREE).read_bytes())
        version, target = tree.get("version", 0), tree["optimizer"]["target"]
    except Exception as error:
        raise WeightsError(f"{place / _TREE} is damaged or not of a T5X checkpoint: {error!r}.") from error
    if not isinstance(version, int | np.integer) or version > _NEWEST:
        raise WeightsError(f"{place} has version {version!r} of T5X's layout; this version reads up to {_NEWEST}.")
    if not isinstance(target, Mapping):
        raise WeightsError(f"{place / _TREE} has a {type(target).__name__} for its target; expected parameters.")
    return target
