"""What `muse_jax.convert` reads: tars, folders, Parquet files and TFDS data sets, in pieces.

An input says which pieces it has, as JSON values, and reads the samples of any one of them, so that many
processes can share the work and a piece that was done need not be done again. What cannot be used
comes out as a `Skipped`, with the reason.
"""

import dataclasses
import functools
import glob
import hashlib
import io
import itertools
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from etils import epath
from PIL import Image

from muse_jax.data import captions, folders, tfds_features, transforms

Piece = Mapping[str, Any]

NO_PICTURE = "no picture"
_BLOCK = 512  # bytes of a tar's header; two empty ones end it
_CHUNK = 2**16  # bytes read at a time behind its last member
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_PACKED_STARTS = (b"\x1f\x8b", b"BZh91AY&SY", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")  # of files in those formats
_JSON_CAPTION = "caption"  # in the .json beside a picture, as img2dataset writes it


class Sample(NamedTuple):
    """A picture's file, as it is, and its captions."""

    key: str
    image: bytes
    text: str | tuple[str, ...]
    split: str = ""  # "train" or "test" where the input says it; else the key's hash does


class Skipped(NamedTuple):
    """A sample that can't be used; or, where it is no `sample`, what else was lost or passed over."""

    key: str
    reason: str
    sample: bool = True


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
        """The tars.

        Raises:
          InputError: if one is compressed, by its name; or there are none.
        """
        paths = _matching(self.path, "tars", ".tar", *_PACKED)
        if packed := [path for path in paths if path.endswith(_PACKED)]:
            raise InputError(
                f"{packed[0]} is compressed ({len(packed)} of {len(paths)} files are); unpack it first, or leave it "
                "out with a pattern, such as --path='DIR/*.tar'."
            )
        return [_file_piece(path) for path in paths]

    def samples(self, piece: Piece) -> Samples:
        """The samples of a tar; of a damaged one those before the damage."""
        name, fault = os.path.basename(piece["path"]), ""
        try:
            with epath.Path(piece["path"]).open("rb") as file:
                if file.read(_BLOCK).startswith(_PACKED_STARTS):
                    yield Skipped(name, "compressed tar: unpack it first", sample=False)
                    return
                file.seek(0)
                with tarfile.open(fileobj=file, mode="r|") as tar:
                    yield from self._grouped(tar)
                    fault = _fault_at_end(file, tar.offset)
        except (tarfile.TarError, EOFError, OSError) as error:
            fault = f"damaged tar ({type(error).__name__})"
        if fault:
            yield Skipped(name, f"{fault}: what followed is lost", sample=False)

    def _grouped(self, tar: tarfile.TarFile) -> Samples:
        seen: set[str] = set()
        for key, members in itertools.groupby(filter(_key, tar), _key):
            first, again = key not in seen, key in seen
            seen.add(key)
            files: dict[str, bytes] = {}
            for member in members:
                extension = "." + os.path.basename(member.name).partition(".")[2].lower()
                if not member.isreg() or member.size > transforms.MAX_BYTES:
                    what = "file too large" if member.isreg() else "not a regular file"
                    yield Skipped(member.name, what, sample=False)
                elif extension in files:
                    again = True
                elif first:
                    files[extension] = tar.extractfile(member).read()
            if first:
                yield self._sample(key, files)
            if again:
                yield Skipped(key, "key a second time in its tar")

    def _sample(self, key: str, files: Mapping[str, bytes]) -> Sample | Skipped:
        pictures = [extension for extension in files if extension in folders.EXTENSIONS]
        meta = _json(files.get(".json", b""))
        if not pictures:
            return Skipped(key, _why_no_picture(files, meta))
        if len(pictures) > 1:
            return Skipped(key, "several pictures of one key")
        text = meta.get(self.text_key or _JSON_CAPTION)
        if ".txt" in files and not self.text_key:
            text = captions.decoded(files[".txt"])
        return Sample(key, files[pictures[0]], _texts(text))


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder of captioned pictures, as the data source "folder" reads it.

    Where it has the sub-folders train and test, they are the splits, and other pictures are in none.
    """

    path: str
    text_key: str = ""
    needs_text: bool = True
    per_shard: int = 10_000

    def pieces(self) -> list[Piece]:
        """Ranges of the usable pictures; what is not usable comes with the first."""
        _scanned.cache_clear()  # the folder may have changed since
        found = _scanned(self.path, self.text_key, self.needs_text)
        stops = [min(start + self.per_shard, len(found.keys)) for start in range(0, len(found.keys), self.per_shard)]
        starts = [0, *stops[:-1]]
        return [
            {"start": start, "stop": stop, "first": found.keys[start], "digest": _digest(found, start, stop)}
            for start, stop in zip(starts, stops, strict=True)
        ]

    def samples(self, piece: Piece) -> Samples:
        """The pictures of a range; with the first range, what the scan skipped and noted."""
        found = _scanned(self.path, self.text_key, self.needs_text)
        if _digest(found, piece["start"], piece["stop"]) != piece["digest"]:
            raise InputError(f"{self.path} changed while it was converted; start again with another --out.")
        if piece["start"] == 0:
            yield from (Skipped(key, reason) for reason, keys in found.skipped.items() for key in keys)
            notes = (folders.printable(note).removesuffix(".") for note in found.notes)
            yield from (Skipped(self.path, note, sample=False) for note in notes)
        splits = folders.named_splits(found)
        for position in range(piece["start"], piece["stop"]):
            key = found.keys[position]
            split = key.partition("/")[0] if splits else ""
            if split not in ("", *splits):
                yield Skipped(key, f"in none of the splits' folders ({', '.join(splits)})")
                continue
            try:
                with open(os.path.join(found.root, key), "rb") as file:
                    yield Sample(key, file.read(), found.captions[position], split)
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

        paths = _matching(self.path, "Parquet files", ".parquet")
        try:
            with epath.Path(paths[0]).open("rb") as file:
                self._check(pq.read_schema(file))
        except (pa.ArrowException, OSError, InputError) as error:
            raise InputError(f"{paths[0]} cannot be read: {error}") from error
        return [_file_piece(path) for path in paths]

    def _check(self, schema: Any) -> None:
        import pyarrow as pa

        listed = "It has " + ", ".join(f"{field.name} ({field.type})" for field in schema) + "."
        for flag, key in (("image_key", self.image_key), ("text_key", self.text_key)):
            if key not in schema.names:
                raise InputError(f"no column {key!r}; set --{flag}. {listed}")
            if schema.get_field_index(key) < 0:
                raise InputError(f"several columns {key!r}; rename all but one, or set --{flag}. {listed}")
        image, text = (_stored(schema.field(key).type) for key in (self.image_key, self.text_key))
        if pa.types.is_struct(image):
            image = _stored(image.field("bytes").type) if image.get_field_index("bytes") >= 0 else None
        if image not in (pa.binary(), pa.large_binary(), pa.binary_view()):
            raise InputError(f"column {self.image_key!r} is no picture's bytes; set --image_key. {listed}")
        text = _stored(text.value_type) if pa.types.is_list(text) or pa.types.is_large_list(text) else text
        if text not in (pa.string(), pa.large_string(), pa.string_view()):
            raise InputError(f"column {self.text_key!r} is no text; set --text_key. {listed}")

    def samples(self, piece: Piece) -> Samples:
        """The rows of a file, a few at a time; of a damaged one those before the damage."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        name = os.path.basename(piece["path"])
        row = 0
        try:
            with epath.Path(piece["path"]).open("rb") as file:
                table = pq.ParquetFile(file)
                self._check(table.schema_arrow)
                for batch in table.iter_batches(64, columns=[self.image_key, self.text_key]):
                    for image, text in zip(batch.column(self.image_key), batch.column(self.text_key), strict=True):
                        yield self._sample(f"{name}:{row}", image, text)
                        row += 1
        except InputError as error:
            yield Skipped(name, f"file not read: {error}", sample=False)
        except (pa.ArrowException, OSError) as error:
            reason = f"damaged file after {row} rows ({type(error).__name__}): the rest is lost"
            yield Skipped(name, reason, sample=False)

    def _sample(self, key: str, image: Any, text: Any) -> Sample | Skipped:
        import pyarrow as pa

        found = (image["bytes"] if isinstance(image, pa.StructScalar) else image).as_py()
        return Sample(key, found, _texts(_decoded(text))) if found else Skipped(key, NO_PICTURE)


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
        if not builder.info.splits:
            flag = f" --data_dir={self.path}" if self.path else ""
            raise InputError(
                f"{self.dataset} is not prepared in {builder.data_dir}; prepare it with "
                f"`tfds build {self.dataset}{flag}`, or in Python with tfds.builder(...).download_and_prepare(), "
                "or set --path to the data_dir that has it."
            )
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
        """The examples of a range; pictures as they are stored, but those of floats, of which files have the bits."""
        import tensorflow_datasets as tfds

        builder = self._builder()
        features = dict(tfds_features.flat(builder.info.features))
        text, floats = features.get(self.text_key), np.dtype(features[self.image_key].np_dtype).kind == "f"
        decoders = None if floats else tfds_features.nested(self.image_key, tfds.decode.SkipDecoding())
        if builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:  # which TFDS reads in this way only
            stored = builder.as_data_source(split=self.split, decoders=decoders)
            examples = (stored[number] for number in range(piece["start"], piece["stop"]))
        else:
            split = tfds.core.ReadInstruction(self.split, from_=piece["start"], to=piece["stop"], unit="abs")
            examples = tfds.as_numpy(builder.as_dataset(split=split, decoders=decoders))
        for number, example in enumerate(examples, piece["start"]):
            values = tfds_features.get(example, self.text_key) if text is not None else ""
            image = tfds_features.get(example, self.image_key)
            file = _png(tfds_features.as_image(np.asarray(image))) if floats else image
            yield Sample(f"{self.split}:{number}", file, _texts(_captions(text, values)))


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _stored(kind: Any) -> Any:
    """The type of a Parquet column's values; those of a dictionary (a categorical of pandas) are the dictionary's."""
    import pyarrow as pa

    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _decoded(found: Any) -> Any:
    """A text of a Parquet column, or a list of them; what is no UTF-8, at which pyarrow would stop, is replaced."""
    import pyarrow as pa

    if isinstance(found, pa.ListScalar):
        return [_decoded(one) for one in found.values or ()]
    if isinstance(found, pa.DictionaryScalar):
        found = found.value
    return found.as_buffer().to_pybytes().decode("utf-8", "replace") if found.is_valid else None


def _captions(feature: Any, value: Any) -> Any:
    if feature is None:
        return ""
    inner = tfds_features.inner(feature)
    many = value if tfds_features.is_many(value) else [value]
    return [tfds_features.as_text(inner, one) for one in many]


def _matching(pattern: str, what: str, *endings: str) -> list[str]:
    """The files of a pattern, or those of a folder with one of the endings, sorted.

    Raises:
      InputError: if there are none.
    """
    given = os.path.expanduser(pattern)
    path = epath.Path(given)
    if path.is_dir():
        visible = (file for file in path.iterdir() if not file.name.startswith("."))
        found = [file for file in visible if file.name.endswith(endings)]
    elif path.exists():
        found = [path]
    elif _remote(given):
        found = list(path.parent.glob(path.name)) if path.parent.exists() else []
    else:
        found = glob.glob(given, recursive=True)
    files = [file for file in map(os.fspath, found) if _remote(file) or os.path.isfile(file)]
    if not files:
        braces = " Braces are not read: write * in their place." if "{" in pattern else ""
        raise InputError(
            f"--path {pattern!r} names no {what}; expected a folder of *{endings[0]}, or a pattern with *, ? or **."
            + braces
        )
    return sorted(files)


def _remote(path: str) -> bool:
    return "://" in path


def _file_piece(path: str) -> Piece:
    """A file, and what changes when another one takes its place."""
    if _remote(path):
        status = epath.Path(path).stat()
        return {"path": path, "bytes": status.length, "mtime": status.mtime}
    status = os.stat(path)
    return {"path": path, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def _key(member: tarfile.TarInfo) -> str:
    """What the files of a sample have in common; "" for what is none of a sample."""
    folder, name = os.path.split(member.name)
    stem = name.partition(".")[0]
    return os.path.join(folder, stem) if stem and not member.isdir() else ""


def _why_no_picture(extensions: Iterable[str], meta: Mapping[str, Any]) -> str:
    """Why a tar's files of one key have no picture; `meta` is what img2dataset says of them."""
    endings = ["." + extension.rpartition(".")[2] for extension in extensions]
    if any(ending in folders.EXTENSIONS for ending in endings):
        return "dots in its name: files are grouped up to the first dot"
    if others := [ending for ending in endings if ending in folders.OTHER_PICTURES]:
        return f"format not read ({others[0]})"
    status = meta.get("status")
    return f"{NO_PICTURE} ({status})" if isinstance(status, str) else NO_PICTURE


def _fault_at_end(file: BinaryIO, end: int) -> str:
    """What is wrong behind a tar's last member: only zeros may follow, at least two blocks of them.

    tarfile takes a damaged header for the end, and one that was cut off between two files for a whole tar.
    """
    file.seek(end)
    zeros = 0
    while data := file.read(_CHUNK):
        if any(data):
            return "damaged tar"
        zeros += len(data)
    return "" if zeros >= 2 * _BLOCK else "tar without an end"


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


def _digest(found: folders.Scan, start: int, stop: int) -> str:
    """Changes with any key, size or caption of a range."""
    parts = (found.keys[start:stop], found.sizes[start:stop], found.captions[start:stop])
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


FORMATS = {"webdataset": WebDataset, "folder": Folder, "parquet": Parquet, "tfds": TFDS}
