"""Folders of ArrayRecord shards: how they are written, and the manifest that says what is in them.

A folder has `manifest.json` and shards `SPLIT-00012-of-00345.array_record`, whose records are msgpack
maps. Both `muse_jax.convert` (pictures) and `muse_jax.precompute` (tokens) write such folders, shard by
shard: a shard appears when it is whole, and beside it a part of the manifest, so that a command that was
stopped goes on with the shards that are missing. The manifest comes last; without it nothing is read.
"""

import bisect
import dataclasses
import hashlib
import itertools
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
SIZES = ".sizes.npy"  # beside each shard of pictures: their width and height, uint32 [records, 2]
CAPTIONS = ".captions.json"  # likewise: the list of their texts; folders that were made before have none
THREADS = 64  # that ask for files, which may be far away

_BESIDE = {"pictures": (SIZES,), "tokens": ()}  # endings of the files beside a shard, by the manifest's kind

# One record a chunk, so that any record can be read by itself.
_WRITER = "group_size:1"
# The index stays in the file: for 460M records it would be gigabytes in every loading process.
_READER = {"index_storage_option": "offloaded", "footer_prefetch_bytes": "0"}
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


def check(folder: epath.Path, plan: Mapping[str, Any]) -> bool:
    """Whether a folder was begun for a plan already; writes nothing.

    Args:
      plan: everything that decides what the records will be, as JSON values.

    Raises:
      ValueError: if the folder is another plan's (names what differs), or has such files and no plan.
    """
    if not (folder / PLAN).exists():
        for pattern in (MANIFEST, PARTS, f"{DRAFTS}*", "*-of-*.array_record*"):
            if found := next(iter(folder.glob(pattern)), None):
                raise ValueError(
                    f"{folder} has {found.name} but no {PLAN}, so that something else made it, which would be "
                    "overwritten; choose another --out."
                )
        return False
    plan, found = _as_json(plan), _read_json(folder / PLAN, "version")
    changed = sorted(key for key in {*plan, *found} if plan.get(key) != found.get(key))
    if not changed:
        return True
    what = f"{folder} was begun with something else"
    if changed == ["pieces"]:
        what = f"{folder} was begun, and since then what is converted has changed"
    # Other settings make other pieces; those alone say more.
    shown = "; ".join(_difference(key, found, plan) for key in changed if key != "pieces" or changed == ["pieces"])
    raise ValueError(f"{what}: {shown}. Choose another --out.")


def begin(folder: epath.Path, plan: Mapping[str, Any]) -> bool:
    """Makes a folder for a plan, or goes on with the same one's.

    Args:
      plan: as in `check`.

    Returns:
      Whether it is finished already, and all of its files are there.

    Raises:
      ValueError: as `check` does.
    """
    if not check(folder, plan):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / PLAN, _as_json(plan))
    (folder / PARTS).mkdir(exist_ok=True)
    return _is_finished(folder)


def _as_json(plan: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps({**plan, "version": VERSION}))


def _difference(key: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs under a key; of lists and mappings the first entry that does."""
    old, new = was.get(key), now.get(key)
    while isinstance(old, dict) and isinstance(new, dict):
        part = next(name for name in sorted({*old, *new}) if old.get(name) != new.get(name))
        key, old, new = f"{key}.{part}", old.get(part), new.get(part)
    if isinstance(old, list) and isinstance(new, list):
        pairs = enumerate(itertools.zip_longest(old, new))
        position, (old, new) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        key = f"{key}[{position}]"
    return f"{key} was {old!r:.200} and is now {new!r:.200}"


def _read_json(path: epath.Path, *keys: str) -> dict[str, Any]:
    """A JSON object with some keys; raises ValueError, naming the file, if it is none."""
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged or another program's ({error}); choose another --out.") from error
    if not isinstance(found, dict) or not found.keys() >= set(keys):
        raise ValueError(f"{path} is damaged or another program's (no {', '.join(keys)}); choose another --out.")
    return found


def _is_finished(folder: epath.Path) -> bool:
    """Whether there is a manifest, and all that it lists; a damaged one is written again."""
    if not (folder / MANIFEST).exists():
        return False
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        shards = [Shard(**entry) for split in manifest["splits"].values() for entry in split["shards"]]
        return not _faults(folder, shards, _BESIDE[manifest["kind"]])
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def done(folder: epath.Path, name: str, kind: str, *keys: str) -> dict[str, Any] | None:
    """A part of the manifest whose shards are as they were written; None if it is to be made, or made again.

    Args:
      name: of its file.
      kind: "pictures" or "tokens".
      keys: that it has besides "shards".

    Raises:
      ValueError: naming the file, if it is no such part.
    """
    path = folder / PARTS / name
    if not path.exists():
        return None
    part = _read_json(path, "shards", *keys)
    try:
        shards = [Shard(**entry) for entry in part["shards"].values()]
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or another program's ({error}); choose another --out.") from error
    return None if _faults(folder, shards, _BESIDE[kind]) else part


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


def read(records: "Records", position: int) -> dict[str, Any]:
    """One of the records that `open_shards` gave.

    Raises:
      UnusableError: if its bytes are not what was written.
      ValueError: if no record of its shard can be read, as the shard's index is damaged.
    """
    try:
        return msgpack.unpackb(records.source[position], unicode_errors=_SURROGATES)
    except (RuntimeError, ValueError) as error:
        path = records.path_of(position)
        if not _opens(path):
            raise ValueError(
                f"{path} is damaged: none of its records can be read ({error}). Bring it back; or remove it, and "
                "start the command that wrote it again, which makes what is missing."
            ) from error
        raise transforms.UnusableError("damaged record", f"{path}: {error}") from error


def _opens(path: str) -> bool:
    """Whether a shard's index can be read."""
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader(path, ",".join(f"{key}:{value}" for key, value in _READER.items()))
    opened = reader.ok()
    if opened:  # else closing it raises
        reader.close()
    return opened


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


def shards_of(folder: epath.Path, manifest: Mapping[str, Any], split: str, hint: str = "") -> list[Shard]:
    """The shards of a split, each of them there and as large as it was.

    Args:
      folder, manifest: as of `read_manifest`.
      split: its name there.
      hint: what to do where there is no such split, for the message.

    Raises:
      ValueError: if there is no such split, or a file is missing or was changed; names it.
    """
    splits = manifest["splits"]
    if split not in splits:
        listed = ", ".join(map(repr, sorted(splits))) or "none"
        raise ValueError(f"{folder} has no split {split!r}, but {listed}.{hint and ' '}{hint}")
    shards = [Shard(**entry) for entry in splits[split]["shards"]]
    faults = _faults(folder, shards)
    if faults:
        more = f" and {len(faults) - 1} more files" if len(faults) > 1 else ""
        raise ValueError(f"{folder} isn't as it was written: {faults[0]}{more}. Bring it back, or write it again.")
    return shards


def _faults(folder: epath.Path, shards: Sequence[Shard], beside: Sequence[str] = ()) -> list[str]:
    """What is missing or of another size; `beside` are endings of other files that each shard has."""

    def fault(shard: Shard) -> str:
        try:
            size = (folder / shard.name).stat().length
        except OSError:
            return f"{shard.name} is missing"
        if size != shard.bytes:
            return f"{shard.name} has {size} bytes, not {shard.bytes}"
        missing = [ending for ending in beside if not (folder / (shard.name + ending)).exists()]
        return f"{shard.name}{missing[0]} is missing" if missing else ""

    with futures.ThreadPoolExecutor(THREADS) as pool:
        return [found for found in pool.map(fault, shards) if found]


def fingerprint(shards: Sequence[Shard]) -> str:
    """Changes with any record, and not with where the files lie."""
    digest = hashlib.sha256(repr([(shard.records, shard.sha256) for shard in shards]).encode())
    return f"{sum(shard.records for shard in shards)}:{digest.hexdigest()[:16]}"


@dataclasses.dataclass(frozen=True)
class Records:
    """Random access to the bytes of records by position, `source`, and which shard has which."""

    source: Any
    paths: tuple[str, ...]
    ends: tuple[int, ...]  # of each shard, the position behind its last record

    def __len__(self) -> int:
        return len(self.source)

    def path_of(self, position: int) -> str:
        """The file that has a record."""
        return self.paths[bisect.bisect_right(self.ends, position)]


def open_shards(folder: epath.Path, shards: Sequence[Shard]) -> Records:
    """The records of shards, in their order; files are opened when they are first read."""
    from array_record.python import array_record_data_source

    ranges = [_Range(os.fspath(folder / s.name), 0, s.records, s.records) for s in shards]
    return Records(
        array_record_data_source.ArrayRecordDataSource(ranges, reader_options=_READER),
        tuple(found.filename for found in ranges),
        tuple(itertools.accumulate(s.records for s in shards)),
    )
