"""Converted pictures as a source: random access to ArrayRecord shards; see `muse_jax.data.make_source`."""

import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from muse_jax.data import array_records, transforms
from muse_jax.data.reading import Reader
from muse_jax.specs import DataSpec


class ArrayRecordSource:
    """The pictures of a folder that `muse_jax.convert` wrote.

    Where a picture has several captions, one of them is drawn by the seed, as crops and flips are.

    Args:
      spec: `path`, the splits, `image_size`, `crop`, `flip`, `min_side` and `max_aspect` are read.
      split: "train" or "eval".

    Raises:
      ValueError: if the folder is no whole one, or no picture passes the filters.
    """

    def __init__(self, spec: DataSpec, split: str = "train"):
        self._spec = spec
        self._split = spec.eval_split if split == "eval" else spec.split
        self._folder, manifest = array_records.read_manifest(spec.path, "pictures")
        hint = "Set data.split to one of them."
        if split == "eval":
            hint = "Set data.eval_split to one of them, or convert the pictures with a larger --eval_share."
        self._shards = array_records.shards_of(self._folder, manifest, self._split, hint)
        self._records = array_records.open_shards(self._folder, self._shards)
        self._kept = self._filtered()
        if not len(self):
            raise ValueError(
                f"No picture of {spec.path}, split {self._split!r}, has at least data.min_side {spec.min_side} "
                f"pixels and at most data.max_aspect {spec.max_aspect}; relax them."
            )
        self._reader = Reader(
            self._read, length=len(self), most_broken=spec.most_broken, name_of=self._name, fixed=False
        )

    def _filtered(self) -> np.ndarray | None:
        """Positions of the pictures that the config's filters keep; None for all of them."""
        if not self._spec.min_side and not self._spec.max_aspect:
            return None
        kept, first = [], 0
        for shard in self._shards:
            sizes = _sizes(self._folder / (shard.name + array_records.SIZES), shard.records)
            kept.append(first + np.flatnonzero(_passing(sizes, self._spec.min_side, self._spec.max_aspect)))
            first += shard.records
        return np.concatenate(kept)

    def __len__(self) -> int:
        return len(self._records) if self._kept is None else len(self._kept)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.example(index, (index,))

    def example(self, index: int, seed: tuple[int, ...]) -> dict[str, Any]:
        """The picture and its caption; `seed` draws the crop, the flip and which of several captions."""
        return self._reader.example(index, seed)

    def _name(self, index: int) -> str:
        return f"example {index} of {self._spec.path}, split {self._split}"

    def _record(self, index: int) -> dict[str, Any]:
        return array_records.read(self._records, int(index if self._kept is None else self._kept[index]))

    def _read(self, index: int, seed: tuple[int, ...]) -> dict[str, Any]:
        record, spec = self._record(index), self._spec
        image = transforms.decode(
            io.BytesIO(record["image"]), spec.image_size, crop=spec.crop, flip=spec.flip, seed=seed
        )
        text = record["text"]
        if not isinstance(text, str):
            text = text[int(np.random.default_rng((*seed, 1)).integers(len(text)))]
        return {"image": image, "text": text}

    def captions(self) -> Iterator[str]:
        """Every caption of the split but those of damaged records, which training skips, too."""
        damaged, stop = [], 0
        for shard in self._shards:
            start, stop = stop, stop + shard.records
            texts = _texts(self._folder / (shard.name + array_records.CAPTIONS), shard.records)
            for position in self._positions(start, stop):
                try:
                    text = texts[position - start] if texts else array_records.read(self._records, position)["text"]
                except transforms.UnusableError as error:
                    damaged.append(str(error))
                    continue
                yield from [text] if isinstance(text, str) else text
        if damaged:
            logging.warning("No captions of %d records of %s; the first: %s", len(damaged), self._spec.path, damaged[0])

    def _positions(self, start: int, stop: int) -> Sequence[int]:
        """Those from `start` to `stop` that the filters keep."""
        if self._kept is None:
            return range(start, stop)
        return self._kept[slice(*np.searchsorted(self._kept, (start, stop)))].tolist()

    def fingerprint(self) -> str:
        """Changes with any picture or caption, and with the filters; not with where the folder lies."""
        filters = "" if self._kept is None else f":{self._spec.min_side}:{self._spec.max_aspect}"
        return f"array_record:{array_records.fingerprint(self._shards)}{filters}"


def _passing(sizes: np.ndarray, min_side: int, max_aspect: float) -> np.ndarray:
    """Where `transforms.size_fault` finds none, of all sizes at once: there may be hundreds of millions."""
    short, long = sizes.min(1).astype(np.int64), sizes.max(1)
    passing = short >= min_side
    return passing & (long <= max_aspect * short) if max_aspect else passing


def _sizes(path: epath.Path, records: int) -> np.ndarray:
    """Width and height of a shard's pictures, uint32 [records, 2]; raises ValueError, naming the file."""
    try:
        sizes = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
        if sizes.shape != (records, 2):
            raise ValueError(f"its shape is {sizes.shape}, not {(records, 2)}")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"{path} has the pictures' sizes, by which data.min_side and data.max_aspect choose, and cannot be read "
            f"({error}). Bring it back; or remove it, and start muse_jax.convert again, which makes what is missing."
        ) from error
    return sizes


def _texts(path: epath.Path, records: int) -> list[str | list[str]] | None:
    """The captions of a shard's pictures, which need not be read for them; None where the file can't be used."""
    try:
        texts = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return texts if isinstance(texts, list) and len(texts) == records else None
