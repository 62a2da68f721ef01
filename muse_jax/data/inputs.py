"""What `muse_jax.convert` reads: tars, folders, Parquet files and TFDS data sets, in pieces.

An input says which pieces it has, as JSON values, and reads the samples of any one of them, so that many
processes can share the work and a piece that was done need not be done again. What cannot be used
comes out as a `Skipped`, with the reason.
"""

import dataclasses
import functools
import io
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath

from muse_jax.data import folders, tfds_features, transforms

Piece = Mapping[str, Any]

NO_PICTURE = "no picture"
_BLOCK = 512  # bytes of a tar's header; two empty ones end it
_JSON_CAPTION = "caption"  # in the .json beside a picture, as img2dataset writes it


class Sample(NamedTuple):
    """A picture's file, as it is, and its captions."""

    key: str
    image: bytes
    text: str | tuple[str, ...]


class Skipped(NamedTuple):
    """A sample that can't be used."""

    key: str
    reason: str


class InputError(ValueError):
    """An input that can't be read at all; the message says what was expected."""


Samples = Iterator[Sample | Skipped]


@dataclasses.dataclass(frozen=True)
class WebDataset:
    """Tars as img2dataset writes them: NAME.jpg, NAME.txt and NAME.json one after the other.

    Nothing is extracted; links and devices are passed over. The caption is the .txt, else `text_key` of the .json.
    """

    path: str  # a pattern, or a folder of tars
    text_key: str = ""

    def pieces(self) -> list[Piece]:
        """The tars."""
        return [
            {"path": path, "bytes": epath.Path(path).stat().length} for path in _matching(self.path, ".tar", "tars")
        ]

    def samples(self, piece: Piece) -> Samples:
        """The samples of a tar; of a damaged one those before the damage."""
        name = os.path.basename(piece["path"])
        if not _ends_well(piece["path"]):
            yield Skipped(name, "tar without an end: what followed is lost")
        try:
            with epath.Path(piece["path"]).open("rb") as file, tarfile.open(fileobj=file, mode="r|") as tar:
                yield from self._grouped(tar)
        except (tarfile.TarError, EOFError, OSError) as error:
            yield Skipped(name, f"damaged tar ({type(error).__name__}): what followed is lost")

    def _grouped(self, tar: tarfile.TarFile) -> Samples:
        seen: set[str] = set()
        key, files = "", {}
        for member in tar:
            folder, name = os.path.split(member.name)
            stem, _, extension = name.partition(".")
            if member.isdir() or not stem:
                continue
            found = os.path.join(folder, stem)
            if found != key:
                if files:
                    yield self._sample(key, files)
                key, files = found, {}
                if key in seen:
                    yield Skipped(key, "key a second time in its tar")
                seen.add(key)
            if not member.isreg() or member.size > transforms.MAX_BYTES:
                what = "file too large" if member.isreg() else "not a regular file"
                yield Skipped(member.name, what)
            else:
                files[f".{extension.lower()}"] = tar.extractfile(member).read()
        if files:
            yield self._sample(key, files)

    def _sample(self, key: str, files: Mapping[str, bytes]) -> Sample | Skipped:
        pictures = [extension for extension in files if extension in folders.EXTENSIONS]
        meta = _json(files.get(".json", b""))
        if not pictures:
            status = meta.get("status")
            return Skipped(key, f"{NO_PICTURE} ({status})" if isinstance(status, str) else NO_PICTURE)
        if len(pictures) > 1:
            return Skipped(key, "several pictures of one key")
        text = meta.get(self.text_key or _JSON_CAPTION)
        if ".txt" in files and not self.text_key:
            text = files[".txt"].decode("utf-8-sig", "replace")
        return Sample(key, files[pictures[0]], _texts(text))


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder of captioned pictures, as the data source "folder" reads it."""

    path: str
    text_key: str = ""
    needs_text: bool = True
    per_shard: int = 10_000

    def pieces(self) -> list[Piece]:
        """Ranges of the usable pictures, and first what of the folder is not usable."""
        found = _scanned(self.path, self.text_key, self.needs_text)
        return [
            {"start": start, "stop": min(start + self.per_shard, len(found.keys)), "first": found.keys[start]}
            for start in range(0, len(found.keys), self.per_shard)
        ]

    def samples(self, piece: Piece) -> Samples:
        """The pictures of a range; with the first range, what the scan skipped."""
        found = _scanned(self.path, self.text_key, self.needs_text)
        if piece["stop"] > len(found.keys) or found.keys[piece["start"]] != piece["first"]:
            raise InputError(f"{self.path} changed while it was converted; start again with another --out.")
        if piece["start"] == 0:
            yield from (Skipped(key, reason) for reason, keys in found.skipped.items() for key in keys)
        for position in range(piece["start"], piece["stop"]):
            key = found.keys[position]
            try:
                with open(os.path.join(found.root, key), "rb") as file:
                    yield Sample(key, file.read(), found.captions[position])
            except OSError as error:
                yield Skipped(key, f"cannot be opened ({error.strerror})")


@dataclasses.dataclass(frozen=True)
class Parquet:
    """Hugging Face's Parquet shards: a column of pictures (their bytes, or a struct with `bytes`) and one of text."""

    path: str  # a pattern, or a folder of .parquet files
    image_key: str = "image"
    text_key: str = "text"

    def pieces(self) -> list[Piece]:
        """The files.

        Raises:
          InputError: if the first one lacks a column, or has it in another type.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        paths = _matching(self.path, ".parquet", "Parquet files")
        try:
            with epath.Path(paths[0]).open("rb") as file:
                self._check(paths[0], pq.read_schema(file))
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{paths[0]} cannot be read: {error}") from error
        return [{"path": path, "bytes": epath.Path(path).stat().length} for path in paths]

    def _check(self, path: str, schema: Any) -> None:
        import pyarrow as pa

        listed = "It has " + ", ".join(f"{field.name} ({field.type})" for field in schema) + "."
        for flag, key in (("image_key", self.image_key), ("text_key", self.text_key)):
            if key not in schema.names:
                raise InputError(f"{path} has no column {key!r}; set --{flag}. {listed}")
        image, text = schema.field(self.image_key).type, schema.field(self.text_key).type
        if pa.types.is_struct(image):
            image = image.field("bytes").type if image.get_field_index("bytes") >= 0 else None
        if image is None or not (pa.types.is_binary(image) or pa.types.is_large_binary(image)):
            raise InputError(f"{path}: column {self.image_key!r} is no picture's bytes; set --image_key. {listed}")
        text = text.value_type if pa.types.is_list(text) or pa.types.is_large_list(text) else text
        if not (pa.types.is_string(text) or pa.types.is_large_string(text)):
            raise InputError(f"{path}: column {self.text_key!r} is no text; set --text_key. {listed}")

    def samples(self, piece: Piece) -> Samples:
        """The rows of a file, a few at a time; of a damaged one those before the damage."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        name = os.path.basename(piece["path"])
        row = 0
        try:
            with epath.Path(piece["path"]).open("rb") as file:
                table = pq.ParquetFile(file)
                self._check(name, table.schema_arrow)
                for batch in table.iter_batches(64, columns=[self.image_key, self.text_key]):
                    for values in batch.to_pylist():
                        yield self._sample(f"{name}:{row}", values)
                        row += 1
        except (pa.ArrowException, OSError, UnicodeDecodeError, InputError) as error:
            yield Skipped(name, f"damaged file after {row} rows ({type(error).__name__}): the rest is lost")

    def _sample(self, key: str, values: Mapping[str, Any]) -> Sample | Skipped:
        image = values[self.image_key]
        if isinstance(image, Mapping):
            image = image["bytes"]
        return Sample(key, image, _texts(values[self.text_key])) if image else Skipped(key, NO_PICTURE)


@dataclasses.dataclass(frozen=True)
class TFDS:
    """A TFDS data set that was prepared, in whatever format."""

    dataset: str
    path: str = ""  # its data_dir
    split: str = "train"
    image_key: str = "image"
    text_key: str = ""
    per_shard: int = 10_000

    def _builder(self) -> Any:
        import tensorflow_datasets as tfds

        try:
            return tfds.builder(self.dataset, data_dir=self.path or None)
        except tfds.core.DatasetNotFoundError as error:
            first = str(error).strip().splitlines()[0]
            raise InputError(f"--dataset {self.dataset!r} is not in {self.path or 'TFDS'}: {first}") from error

    def pieces(self) -> list[Piece]:
        """Ranges of examples.

        Raises:
          InputError: if there is no such split, or no such feature; lists what there is.
        """
        builder = self._builder()
        if self.split not in builder.info.splits:
            raise InputError(f"{self.dataset} has no split {self.split!r}, but {', '.join(builder.info.splits)}.")
        try:
            found = tfds_features.Features(builder)
            found.image(self.image_key)
            if self.text_key:
                found.text(self.text_key)
        except ValueError as error:
            raise InputError(str(error).replace("data.", "--")) from error
        count = builder.info.splits[self.split].num_examples
        return [
            {"start": start, "stop": min(start + self.per_shard, count)} for start in range(0, count, self.per_shard)
        ]

    def samples(self, piece: Piece) -> Samples:
        """The examples of a range; pictures as they are stored, not decoded."""
        import tensorflow_datasets as tfds

        builder = self._builder()
        text = dict(tfds_features.flat(builder.info.features)).get(self.text_key)
        decoders = {self.image_key: tfds.decode.SkipDecoding()}
        if builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:  # which TFDS reads in this way only
            stored = builder.as_data_source(split=self.split, decoders=decoders)
            examples = (stored[number] for number in range(piece["start"], piece["stop"]))
        else:
            split = tfds.core.ReadInstruction(self.split, from_=piece["start"], to=piece["stop"], unit="abs")
            examples = tfds.as_numpy(builder.as_dataset(split=split, decoders=decoders))
        for number, example in enumerate(examples, piece["start"]):
            values = tfds_features.get(example, self.text_key) if text is not None else ""
            yield Sample(f"{self.split}:{number}", example[self.image_key], _texts(_captions(text, values)))


def _captions(feature: Any, value: Any) -> Any:
    if feature is None:
        return ""
    inner = tfds_features.inner(feature)
    many = value if tfds_features.is_many(value) else [value]
    return [tfds_features.as_text(inner, one) for one in many]


def _matching(pattern: str, ending: str, what: str) -> list[str]:
    """The files of a pattern or a folder, sorted.

    Raises:
      InputError: if there are none.
    """
    path = epath.Path(os.path.expanduser(pattern))
    if path.is_dir():
        visible = (file for file in path.iterdir() if not file.name.startswith("."))
        found = [file for file in visible if file.name.endswith(ending)]
    elif path.exists():
        found = [path]
    else:
        found = list(path.parent.glob(path.name)) if path.parent.exists() else []
    if not found:
        raise InputError(f"--path {pattern!r} names no {what}; expected a folder of *{ending}, or a pattern.")
    return sorted(map(os.fspath, found))


def _ends_well(path: str) -> bool:
    """Whether a tar has its end mark; one that was cut between two files reads as if it were whole."""
    with epath.Path(path).open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        if size < 2 * _BLOCK:
            return False
        file.seek(size - 2 * _BLOCK)
        return not any(file.read(2 * _BLOCK))


def _json(data: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _texts(value: Any) -> str | tuple[str, ...]:
    """A caption, or several; white space collapsed, empty ones dropped; "" where there is none."""
    values = value if isinstance(value, list | tuple) else [value]
    kept = tuple(filter(None, (" ".join(text.split()) for text in values if isinstance(text, str))))
    return kept[0] if len(kept) == 1 else kept or ""


@functools.lru_cache(maxsize=1)
def _scanned(path: str, text_key: str, needs_text: bool) -> folders.Scan:
    try:
        return folders.scan(path, text_key=text_key or "text", needs_text=needs_text)
    except (ValueError, FileNotFoundError) as error:
        raise InputError(str(error).replace("data.path", "--path")) from error


FORMATS = {"webdataset": WebDataset, "folder": Folder, "parquet": Parquet, "tfds": TFDS}
