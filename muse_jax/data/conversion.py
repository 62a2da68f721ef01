"""One piece of an input to shards of pictures: the work that `muse_jax.convert` spreads over processes."""

import collections
import contextlib
import dataclasses
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from muse_jax.data import array_records, folders, inputs, transforms

SPLITS = ("train", "test")
_CHECKED_SIDE = 8  # pixels; a JPEG is read whole and hardly computed
_NAMED = 10  # skipped samples that the manifest names for each reason; the parts have all


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What is done with every sample.

    Attributes:
      source: one of `inputs.FORMATS`' classes.
      out: the folder.
      eval_share: of the samples, by the hash of their keys, that go to the split "test"; where the source has
        splits of its own, they are kept.
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
          The part of the manifest: {"shards": {split: shard}, "skipped": {reason: {"count": how many, "first": keys}},
          "samples": their number, "notes": {what was lost besides samples, or passed over: likewise, where}}.
        """
        folder = epath.Path(self.out)
        place = folder / array_records.PARTS / f"{number:05d}.json"
        if done := array_records.done(folder, place.name, "pictures", "skipped", "samples"):
            return _short(done)
        skipped, notes = collections.defaultdict(list), collections.defaultdict(list)
        shards, samples = {}, 0
        with contextlib.ExitStack() as stack:
            writers = {split: _Writer(folder, split, number, count, stack) for split in SPLITS}
            for sample in self.source.samples(piece):
                found = self._checked(sample)
                if isinstance(found, inputs.Skipped):
                    reasons = skipped if found.sample else notes
                    reasons[found.reason].append(folders.printable(found.key))
                    samples += found.sample
                else:
                    samples += 1
                    split = sample.split or SPLITS[folders.hash_share(sample.key) < self.eval_share]
                    writers[split].write(sample, found)
            for split, writer in writers.items():
                shard = writer.finish()
                if shard:
                    shards[split] = dataclasses.asdict(shard)
        part = {"shards": shards, "skipped": skipped, "samples": samples, "notes": notes}
        array_records.write_json(place, part)
        return _short(part)

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
        array_records.write_manifest(
            epath.Path(self.out),
            "pictures",
            parts,
            samples=sum(part["samples"] for part in parts),
            skipped=_counted(part["skipped"] for part in parts),
            notes=_counted(part["notes"] for part in parts),
        )


def _short(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part as the manifest needs it: all keys of all parts would be gigabytes, which one process gathers."""
    return {**part, **{name: _named(part.get(name, {})) for name in ("skipped", "notes")}}


def _named(found: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
    return {reason: {"count": len(keys), "first": keys[:_NAMED]} for reason, keys in found.items()}


def _counted(found: Iterable[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """{reason: how many there are, and the first few} over all parts."""
    counted: dict[str, dict[str, Any]] = {}
    for reasons in found:
        for reason, named in reasons.items():
            entry = counted.setdefault(reason, {"count": 0, "first": []})
            entry["count"] += named["count"]
            entry["first"] = [*entry["first"], *named["first"]][:_NAMED]
    return counted


class _Writer:
    """A shard of pictures, and beside it the files with their sizes and captions."""

    def __init__(self, folder: epath.Path, split: str, number: int, count: int, stack: contextlib.ExitStack):
        self._folder = folder
        self._name = f"{split}-{number:05d}-of-{count:05d}.array_record"
        self._shard = stack.enter_context(array_records.ShardWriter(folder, self._name))
        self._sizes: list[tuple[int, int]] = []
        self._texts: list[str | tuple[str, ...]] = []

    def write(self, sample: inputs.Sample, size: tuple[int, int]) -> None:
        record = {"key": sample.key, "image": sample.image, "text": sample.text}
        self._shard.write(array_records.pack(record))
        self._sizes.append(size)
        self._texts.append(sample.text)

    def finish(self) -> array_records.Shard | None:
        if self._sizes:
            file = io.BytesIO()
            np.save(file, np.array(self._sizes, np.uint32))
            array_records.write_bytes(self._folder / (self._name + array_records.SIZES), file.getvalue())
            array_records.write_json(self._folder / (self._name + array_records.CAPTIONS), self._texts)
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
