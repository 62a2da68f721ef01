"""One piece of an input to shards of pictures: the work that `muse_jax.convert` spreads over processes."""

import collections
import contextlib
import dataclasses
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from muse_jax.data import array_records, folders, inputs, transforms
from muse_jax.data.array_record_source import SIZES

SPLITS = ("train", "test")
_CHECKED_SIDE = 8  # pixels; a JPEG is read whole and hardly computed
_NAMED = 10  # skipped samples that the manifest names for each reason; the parts have all


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What is done with every sample.

    Attributes:
      source: one of `inputs.FORMATS`' classes.
      out: the folder.
      eval_share: of the samples, by the hash of their keys, that go to the split "test".
      needs_text: whether samples without a caption are skipped.
      min_side, max_aspect: see `transforms.size_fault`.
    """

    source: Any
    out: str
    eval_share: float
    needs_text: bool
    min_side: int
    max_aspect: float

    def plan(self, pieces: Sequence[inputs.Piece]) -> dict[str, Any]:
        """What a folder is begun with; see `array_records.begin`."""
        settings = dataclasses.asdict(self)
        del settings["out"]
        return {**settings, "from": type(self.source).__name__, "pieces": list(pieces)}

    def convert(self, number: int, count: int, piece: inputs.Piece) -> dict[str, Any]:
        """Makes the shards of a piece, number `number` of `count`, unless they are there.

        Returns:
          The part of the manifest: {"shards": {split: shard}, "skipped": {reason: keys}, "samples": their number}.
        """
        folder = epath.Path(self.out)
        place = folder / array_records.PARTS / f"{number:05d}.json"
        if place.exists():
            return json.loads(place.read_text())
        skipped: dict[str, list[str]] = collections.defaultdict(list)
        shards, samples = {}, 0
        with contextlib.ExitStack() as stack:
            writers = {split: _Writer(folder, split, number, count, stack) for split in SPLITS}
            for sample in self.source.samples(piece):
                samples += 1
                found = self._checked(sample)
                if isinstance(found, inputs.Skipped):
                    skipped[found.reason].append(folders.printable(found.key))
                else:
                    split = SPLITS[folders.hash_share(sample.key) < self.eval_share]
                    writers[split].write(sample, found)
            for split, writer in writers.items():
                shard = writer.finish()
                if shard:
                    shards[split] = dataclasses.asdict(shard)
        part = {"shards": shards, "skipped": skipped, "samples": samples}
        array_records.write_json(place, part)
        return part

    def _checked(self, sample: inputs.Sample | inputs.Skipped) -> tuple[int, int] | inputs.Skipped:
        """A sound picture's width and height."""
        if isinstance(sample, inputs.Skipped):
            return sample
        if self.needs_text and not sample.text:
            return inputs.Skipped(sample.key, folders.NO_CAPTION)
        try:
            size = _size(sample.image)
        except transforms.UnusableError as error:
            return inputs.Skipped(sample.key, error.reason)
        fault = transforms.size_fault(*size, self.min_side, self.max_aspect)
        return inputs.Skipped(sample.key, fault) if fault else size

    def write_manifest(self, parts: Iterable[Mapping[str, Any]]) -> None:
        """Writes the manifest of all parts, in the order of their pieces."""
        parts = list(parts)
        skipped: dict[str, dict[str, Any]] = {}
        for part in parts:
            for reason, keys in part["skipped"].items():
                entry = skipped.setdefault(reason, {"count": 0, "first": []})
                entry["count"] += len(keys)
                entry["first"] = (entry["first"] + keys)[:_NAMED]
        array_records.write_manifest(
            epath.Path(self.out), "pictures", parts, samples=sum(part["samples"] for part in parts), skipped=skipped
        )


class _Writer:
    """A shard of pictures and the file with their sizes beside it."""

    def __init__(self, folder: epath.Path, split: str, number: int, count: int, stack: contextlib.ExitStack):
        self._folder = folder
        self._name = f"{split}-{number:05d}-of-{count:05d}.array_record"
        self._shard = stack.enter_context(array_records.ShardWriter(folder, self._name))
        self._sizes: list[tuple[int, int]] = []

    def write(self, sample: inputs.Sample, size: tuple[int, int]) -> None:
        record = {"key": sample.key, "image": sample.image, "text": sample.text}
        self._shard.write(array_records.pack(record))
        self._sizes.append(size)

    def finish(self) -> array_records.Shard | None:
        if self._sizes:
            file = io.BytesIO()
            np.save(file, np.array(self._sizes, np.uint32))
            array_records.write_bytes(self._folder / (self._name + SIZES), file.getvalue())
        return self._shard.finish()


def _size(image: bytes) -> tuple[int, int]:
    """Width and height of a picture that can be decoded.

    Raises:
      UnusableError: if it can't.
    """
    if not image:
        raise transforms.UnusableError("empty file")
    if len(image) > transforms.MAX_BYTES:
        raise transforms.UnusableError(f"larger than {transforms.MAX_BYTES >> 20} MiB")
    with transforms.open_image(io.BytesIO(image)) as opened:
        size = opened.size
    transforms.decode(io.BytesIO(image), _CHECKED_SIDE)
    return size
