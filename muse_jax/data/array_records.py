"""Folders of ArrayRecord shards: how they are written, and the manifest that says what is in them.

A folder has `manifest.json` and shards `SPLIT-00012-of-00345.array_record`, whose records are msgpack
maps. Both `muse_jax.convert` (pictures) and `muse_jax.precompute` (tokens) write such folders, shard by
shard: a shard appears when it is whole, and beside it a part of the manifest, so that a command that was
stopped goes on with the shards that are missing. The manifest comes last; without it nothing is read.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any

import msgpack
from etils import epath

from muse_jax.data import transforms

MANIFEST, PARTS, PLAN = "manifest.json", "parts", "plan.json"
VERSION = 1
DRAFTS = ".draft-"  # how the names of folders with unfinished files start

# One record a chunk, so that any record can be read by itself.
_WRITER = "group_size:1"
# The index stays in the file: for 460M records it would be gigabytes in every loading process.
_READER = {"index_storage_option": "offloaded", "footer_prefetch_bytes": "0"}
_THREADS = 64
_SURROGATES = "surrogatepass"  # names of files and escapes in JSON may have half of a pair


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of records. `sha256` is of the records, whatever the file's compression."""

    name: str
    records: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class _Range:
    """What ArrayRecordDataSource wants to know of a file, so that it need not open it at the start."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class ShardWriter:
    """Writes a shard, whole or not at all; one of its name is replaced.

    As a context manager it removes what was not finished.
    """

    def __init__(self, folder: epath.Path, name: str):
        from array_record.python import array_record_module

        self._target = folder / name
        self._draft = _draft(folder)
        self._path = os.path.join(self._draft.name, name)
        self._writer = array_record_module.ArrayRecordWriter(self._path, _WRITER)
        self._digest = hashlib.sha256()
        self._count = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._writer.is_open():
            self._writer.close()
        self._draft.cleanup()

    def write(self, record: bytes) -> None:
        """Adds a record."""
        self._writer.write(record)
        self._digest.update(len(record).to_bytes(8, "little") + record)
        self._count += 1

    def finish(self) -> Shard | None:
        """Puts the file in its place; without any record there is none, and the result is None."""
        self._writer.close()
        if not self._count:
            return None
        size = os.path.getsize(self._path)
        put(self._path, self._target)
        return Shard(self._target.name, self._count, size, self._digest.hexdigest())


def _draft(folder: epath.Path) -> tempfile.TemporaryDirectory:
    """Where a file is made: beside its place if that can be, so that a rename brings it there."""
    return tempfile.TemporaryDirectory(prefix=DRAFTS, dir=None if _remote(folder) else os.fspath(folder))


def _remote(path: epath.Path) -> bool:
    return "://" in os.fspath(path)


def put(path: str, target: epath.Path) -> None:
    """Moves a finished local file to where it belongs, which may be a bucket; it appears there whole."""
    if _remote(target):
        epath.Path(path).copy(target, overwrite=True)
        return
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    os.replace(path, target)


def write_json(path: epath.Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def write_bytes(path: epath.Path, data: bytes) -> None:
    """Writes a file whole or not at all."""
    with _draft(path.parent) as draft:
        local = os.path.join(draft, path.name)
        with open(local, "wb") as file:
            file.write(data)
        put(local, path)


def sweep(folder: epath.Path) -> None:
    """Removes what writers that were killed left unfinished. No other command may be writing there."""
    for where in (folder, folder / PARTS):
        for left in where.glob(f"{DRAFTS}*") if where.exists() else ():
            shutil.rmtree(os.fspath(left), ignore_errors=True)


def begin(folder: epath.Path, plan: Mapping[str, Any]) -> bool:
    """Makes a folder for a plan, or goes on with the same one's.

    Args:
      plan: everything that decides what the records will be, as JSON values.

    Returns:
      Whether it is finished already.

    Raises:
      ValueError: if the folder is another plan's; names what differs.
    """
    plan = json.loads(json.dumps({**plan, "version": VERSION}))
    (folder / PARTS).mkdir(parents=True, exist_ok=True)
    if not (folder / PLAN).exists():
        if (folder / MANIFEST).exists():
            raise ValueError(f"{folder} has a {MANIFEST} but no {PLAN}; choose another --out.")
        write_json(folder / PLAN, plan)
        return False
    found = json.loads((folder / PLAN).read_text())
    changed = sorted(key for key in {*plan, *found} if plan.get(key) != found.get(key))
    if changed:
        shown = "; ".join(f"{key} was {found.get(key)!r:.200} and is now {plan.get(key)!r:.200}" for key in changed)
        raise ValueError(f"{folder} was begun with something else: {shown}. Choose another --out.")
    return (folder / MANIFEST).exists()


def write_manifest(folder: epath.Path, kind: str, parts: Sequence[Mapping[str, Any]], **more: Any) -> None:
    """Writes the manifest of finished parts, which ends the work.

    Args:
      kind: "pictures" or "tokens".
      parts: of each, {"shards": {split: Shard as a dict}}, in the order in which they will be read.
      more: other entries of the manifest.
    """
    splits: dict[str, Any] = {}
    for part in parts:
        for split, shard in part["shards"].items():
            entry = splits.setdefault(split, {"records": 0, "bytes": 0, "shards": []})
            entry["records"] += shard["records"]
            entry["bytes"] += shard["bytes"]
            entry["shards"].append(shard)
    write_json(folder / MANIFEST, {"version": VERSION, "kind": kind, "splits": splits, **more})


def pack(record: Mapping[str, Any]) -> bytes:
    """A record's bytes."""
    return msgpack.packb(dict(record), unicode_errors=_SURROGATES)


def read(records: Any, position: int) -> dict[str, Any]:
    """One of the records that `open_shards` gave.

    Raises:
      UnusableError: if its bytes are not what was written.
    """
    try:
        return msgpack.unpackb(records[position], unicode_errors=_SURROGATES)
    except (RuntimeError, ValueError) as error:
        raise transforms.UnusableError("damaged record", str(error)) from error


def read_manifest(path: str, kind: str) -> tuple[epath.Path, dict[str, Any]]:
    """A folder and its manifest.

    Args:
      path: the folder.
      kind: "pictures" or "tokens".

    Raises:
      ValueError: if it is not such a folder, is not whole, or is of another kind.
    """
    command = {"pictures": "muse_jax.convert", "tokens": "muse_jax.precompute"}[kind]
    folder = epath.Path(os.path.expanduser(path))
    if not path or not folder.exists():
        raise ValueError(f"data.path is {path!r}, which is not there; name a folder that {command} wrote.")
    if not (folder / MANIFEST).exists():
        begun = (folder / PLAN).exists()
        what = "is not finished; start the command that writes it again" if begun else f"was not written by {command}"
        raise ValueError(f"data.path {path!r} has no {MANIFEST}: it {what}.")
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        version, found = manifest["version"], manifest["kind"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / MANIFEST} is damaged ({error!r}); write the folder again.") from error
    if version != VERSION:
        raise ValueError(f"{folder / MANIFEST} is of version {version}; this is version {VERSION}. Write it again.")
    if found != kind:
        name = {"pictures": "array_record", "tokens": "precomputed"}[found]
        raise ValueError(f"data.path {path!r} holds {found}, not {kind}; set data.name={name!r} to read it.")
    return folder, manifest


def shards_of(folder: epath.Path, manifest: Mapping[str, Any], split: str) -> list[Shard]:
    """The shards of a split, each of them there and as large as it was.

    Raises:
      ValueError: if there is no such split, or a file is missing or was changed; names it.
    """
    splits = manifest["splits"]
    if split not in splits:
        raise ValueError(f"{folder} has no split {split!r}, but {', '.join(map(repr, sorted(splits))) or 'none'}.")
    shards = [Shard(**entry) for entry in splits[split]["shards"]]

    def fault(shard: Shard) -> str:
        try:
            size = (folder / shard.name).stat().length
        except OSError:
            return f"{shard.name} is missing"
        return "" if size == shard.bytes else f"{shard.name} has {size} bytes, not {shard.bytes}"

    with futures.ThreadPoolExecutor(_THREADS) as pool:
        faults = [found for found in pool.map(fault, shards) if found]
    if faults:
        more = f" and {len(faults) - 1} more files" if len(faults) > 1 else ""
        raise ValueError(f"{folder} isn't as it was written: {faults[0]}{more}. Bring it back, or write it again.")
    return shards


def fingerprint(shards: Sequence[Shard]) -> str:
    """Changes with any record, and not with where the files lie."""
    digest = hashlib.sha256(repr([(shard.records, shard.sha256) for shard in shards]).encode())
    return f"{sum(shard.records for shard in shards)}:{digest.hexdigest()[:16]}"


def open_shards(folder: epath.Path, shards: Sequence[Shard]) -> Any:
    """Random access to the records of shards, in their order; files are opened when they are first read."""
    from array_record.python import array_record_data_source

    ranges = [_Range(os.fspath(folder / s.name), 0, s.records, s.records) for s in shards]
    return array_record_data_source.ArrayRecordDataSource(ranges, reader_options=_READER)
