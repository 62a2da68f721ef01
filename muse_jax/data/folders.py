"""A folder of captioned pictures, as Hugging Face's imagefolder has it.

A picture's caption is in ``name.txt`` beside it, else in the nearest ``metadata.jsonl`` or
``metadata.csv`` (columns ``file_name``, relative to the metadata's folder, and ``text``) of its
folder or one above. Files that cannot be used are skipped, counted by reason and listed by name::

  python -m muse_jax.data.folders DIR            # what is skipped and why, from headers and captions
  python -m muse_jax.data.folders DIR --decode   # also decodes every picture
"""

import argparse
import collections
import dataclasses
import functools
import hashlib
import heapq
import io
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import logging

from muse_jax.data import captions as captions_lib
from muse_jax.data import transforms
from muse_jax.data.reading import Reader, patiently
from muse_jax.specs import DataSpec

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif")
OTHER_PICTURES = (".tif", ".tiff", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".eps", ".psd", ".ico", ".tga")
SPLITS = ("train", "test")  # sub-folders that are splits, unless a config names others
EVAL_SHARE = 0.05  # of the files, by the hash of their names
NO_CAPTION = "no caption"

_NAMES_SHOWN = 5
_HASHED = 64  # files of a split, evenly spread, whose content is a part of the fingerprint

LAYOUT = (
    "Expected picture files (JPEG, PNG, WEBP, BMP or GIF) with captions in name.txt beside name.jpg, "
    "or in metadata.jsonl or metadata.csv with file_name and text."
)


@dataclasses.dataclass(frozen=True)
class Scan:
    """What is in a folder: the usable pictures in the order of their keys, and the others by reason."""

    root: str
    keys: tuple[str, ...]  # paths below root, with "/"
    captions: tuple[str, ...]  # "" where there is none
    sizes: tuple[int, ...]  # bytes
    skipped: dict[str, tuple[str, ...]]  # reason -> keys
    notes: tuple[str, ...]  # what is odd but costs no picture

    def summary(self) -> str:
        """One paragraph for the log: counts by reason and the first few names."""
        dropped = sum(map(len, self.skipped.values()))
        text = f"{self.root}: {len(self.keys)} of {len(self.keys) + dropped} pictures are usable."
        for reason, names in sorted(self.skipped.items()):
            shown = ", ".join(map(printable, names[:_NAMES_SHOWN])) + (", ..." if len(names) > _NAMES_SHOWN else "")
            text += f" Skipped {len(names)}, {reason}: {shown}."
        if dropped > _NAMES_SHOWN:
            text += f" All names: python -m muse_jax.data.folders {self.root}"
        return " ".join([text, *self.notes])


def scan(
    root: str,
    *,
    text_key: str = "text",
    needs_text: bool = True,
    min_side: int = 0,
    max_aspect: float = 0.0,
    splits: tuple[str, str] = SPLITS,
) -> Scan:
    """Lists a folder; reads headers and captions, but no pixels.

    Args:
      root: the folder; hidden files and folders in it are not looked at.
      text_key: the caption's column in metadata files.
      needs_text: whether pictures without a caption are skipped; a tokenizer and a model of classes need none.
      min_side, max_aspect: see `transforms.size_fault`; pictures with a fault are skipped.
      splits: names of the sub-folders to train and to evaluate on, where there are such; see `_walk`.

    Raises:
      FileNotFoundError: if there is no such folder.
      ValueError: if nothing in it is usable; says why for each reason, and how to lay it out.
    """
    found = _listed(root, text_key, min_side, max_aspect, splits)
    if needs_text:
        found = _captioned(found)
    if not found.keys:
        raise ValueError(f"Nothing is usable. {found.summary()} {LAYOUT}" + _hint(found))
    return found


def _listed(root: str, text_key: str, min_side: int, max_aspect: float, splits: tuple[str, str]) -> Scan:
    """A folder's pictures, with captions or without, if it has any."""
    root = os.path.expanduser(root)
    if not os.path.isdir(root):
        raise FileNotFoundError(f"data.path is {root!r}, which is no folder. {LAYOUT}")
    root = os.path.abspath(root)
    return _scan(root, _walk(root, splits), text_key, min_side, max_aspect)


def _captioned(found: Scan) -> Scan:
    """Of a scan's pictures those with a caption; the others are skipped."""
    missing = tuple(key for key, text in zip(found.keys, found.captions, strict=True) if not text)
    kept = [i for i, text in enumerate(found.captions) if text]
    keys, texts, sizes = (tuple(v[i] for i in kept) for v in (found.keys, found.captions, found.sizes))
    skipped = found.skipped | ({NO_CAPTION: missing} if missing else {})
    return dataclasses.replace(found, keys=keys, captions=texts, sizes=sizes, skipped=skipped)


def _hint(found: Scan) -> str:
    if "format not read" in " ".join(found.skipped):
        return " Convert other formats to PNG or JPEG first."
    return "" if found.skipped else " There are no picture files in it at all."


def _walk(root: str, splits: tuple[str, str]) -> tuple[tuple[str, int, int], ...]:
    """(key, bytes, change time) of every file below root, sorted by key; links to folders are followed.

    A folder that has several names by links is listed once: by a split's name, so that nothing of the evaluation
    split is trained on, else by its own, else by the first link's. One that cannot be opened is listed with a "/"
    at its end; where storage fails, that is an error.
    """
    first = splits[::-1]
    seen, found, pending = set(), [], [(0, "")]
    while pending:
        _, folder = heapq.heappop(pending)
        try:
            which, listed = patiently(_entries, os.path.join(root, folder))
        except OSError as error:
            if transforms.is_outage(error):  # other machines, or the next start, would see other pictures
                raise
            found.append((f"{folder}/", 0, 0))
            continue
        if which in seen:
            continue
        seen.add(which)
        for entry, is_folder, size_and_time in listed:
            key = f"{folder}/{entry.name}" if folder else entry.name
            if is_folder:
                turn = first.index(key) if key in first else len(first) + entry.is_symlink()
                heapq.heappush(pending, (turn, key))
            else:
                found.append((key, *size_and_time))
    return tuple(sorted(found))


def _entries(folder: str) -> tuple[tuple[int, int], list[tuple[os.DirEntry, bool, tuple[int, int]]]]:
    """Which folder it is, by whatever name; what is in it, whether that is a folder, and its size and time.

    Raises:
      OSError: if it can't be opened, or storage fails.
    """
    status = os.stat(folder)
    with os.scandir(folder) as entries:
        shown = [entry for entry in entries if not entry.name.startswith(".") and entry.name != "__MACOSX"]
    listed = [(entry, _is_folder(entry), _size_and_time(entry)) for entry in sorted(shown, key=lambda e: e.name)]
    return (status.st_dev, status.st_ino), listed


def _is_folder(entry: Any) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if transforms.is_outage(error):
            raise
        return False  # a link in a circle


def _size_and_time(entry: os.DirEntry) -> tuple[int, int]:
    try:
        status = entry.stat()
    except OSError as error:
        if transforms.is_outage(error):
            raise
        return 0, 0  # a link to nowhere
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=4)  # training, evaluation, vocabulary and fingerprint ask for the same folder
def _scan(
    root: str,
    files: tuple[tuple[str, int, int], ...],
    text_key: str,
    min_side: int,
    max_aspect: float,
) -> Scan:
    captions = captions_lib.Captions(root, frozenset(key for key, _, _ in files), text_key)
    keys, texts, sizes = [], [], []
    skipped: dict[str, list[str]] = collections.defaultdict(list)
    for key, size, _ in files:
        extension = os.path.splitext(key)[1].lower()
        if key.endswith("/"):
            skipped["folder cannot be opened"].append(key)
        elif extension in OTHER_PICTURES:
            skipped[f"format not read ({extension})"].append(key)
        elif extension in EXTENSIONS or captions.lists(key):
            reason = _header_fault(os.path.join(root, key), min_side, max_aspect)
            if reason:
                skipped[reason].append(key)
            else:
                keys.append(key)
                texts.append(captions.of(key))
                sizes.append(size)
    if keys and not any(texts):
        captions.notes.append("No picture has a caption; that is enough for a tokenizer.")
    named = {reason: tuple(names) for reason, names in skipped.items()}
    return Scan(root, tuple(keys), tuple(texts), tuple(sizes), named, tuple(captions.finish()))


@functools.lru_cache(maxsize=64)
def _log_once(summary: str, level: int) -> None:
    logging.log(level, "%s", summary)


def _header_fault(path: str, min_side: int, max_aspect: float) -> str:
    try:
        return transforms.size_fault(*patiently(_picture_size, path), min_side, max_aspect)
    except transforms.UnusableError as error:
        return error.reason


def _picture_size(path: str) -> tuple[int, int]:
    transforms.check_file_size(path)
    with transforms.open_image(path) as image:
        return image.size


def printable(name: str) -> str:
    """A file's name as it can be written anywhere, also if it is no valid UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def named_splits(scanned: Scan, train_name: str = SPLITS[0], eval_name: str = SPLITS[1]) -> tuple[str, ...]:
    """The two names, if they are those of sub-folders which are the splits; else ()."""
    names = (train_name, eval_name)
    tops = {key.partition("/")[0] for key in scanned.keys if "/" in key}
    return names if tops.issuperset(names) and train_name != eval_name else ()


def split_positions(
    scanned: Scan, split: str, train_name: str = SPLITS[0], eval_name: str = SPLITS[1]
) -> tuple[int, ...]:
    """Positions (in `scanned.keys`) of the pictures of one split.

    If the folder has sub-folders named `train_name` and `eval_name`, they are the splits. Else the hash
    of a picture's key decides, so that it keeps its split when others are added; the evaluation split
    has at least one picture, and of a single picture both splits have it.

    Args:
      split: "train" or "eval".
    """
    positions = range(len(scanned.keys))
    if named_splits(scanned, train_name, eval_name):
        name = eval_name if split == "eval" else train_name
        return tuple(i for i in positions if scanned.keys[i].startswith(f"{name}/"))
    if len(positions) == 1:
        return (0,)
    shares = [hash_share(key) for key in scanned.keys]
    least = min(max(EVAL_SHARE, np.nextafter(min(shares), 1)), max(shares))  # neither split is empty
    if split == "eval":
        return tuple(i for i in positions if shares[i] < least)
    return tuple(i for i in positions if shares[i] >= least)


def hash_share(key: str) -> float:
    """A number in [0, 1) from a key alone."""
    return int.from_bytes(hashlib.sha256(os.fsencode(key)).digest()[:6], "big") / 2**48


class FolderSource:
    """The pictures of a folder's split, by index; see `muse_jax.data.make_source`.

    A file whose pixels turn out to be broken is replaced by another one, the same on every machine and
    in every epoch; `broken` has its key and the reason. Where all that is held out is broken, as the one
    such picture of a small folder may be, training pictures stand in for it.

    Args:
      spec: `path`, `image_size`, `text_key` ("text" if empty), `crop`, `flip`, `min_side`, `max_aspect` and
        the splits are read. With `vocabulary` "classes" each sub-folder with pictures is a class, and
        examples have its label.
      split: "train" or "eval".
    """

    def __init__(self, spec: DataSpec, split: str = "train"):
        self.scan = scan(
            spec.path,
            text_key=spec.text_key or "text",
            needs_text=spec.text_length > 0,
            min_side=spec.min_side,
            max_aspect=spec.max_aspect,
            splits=(spec.split, spec.eval_split),
        )
        _log_once(self.scan.summary(), logging.WARNING if self.scan.skipped or self.scan.notes else logging.INFO)
        self._spec = spec
        own = split_positions(self.scan, split, spec.split, spec.eval_split)
        spares = split_positions(self.scan, "train", spec.split, spec.eval_split) if split == "eval" else ()
        self._read_from = np.array(own + spares, np.int64)
        self._positions = self._read_from[: len(own)]
        self._has_text = any(self.scan.captions)
        self._classes = self._find_classes() if spec.vocabulary == "classes" else []
        if not len(self._positions):
            raise ValueError(f"The {split} split has no picture. {self.scan.summary()}")
        self._reader = Reader(
            self._read,
            length=len(self),
            name_of=self._name,
            fixed=spec.crop == "center" and not spec.flip,
            most_broken=spec.most_broken,
            spares=len(spares),
        )

    def _find_classes(self) -> list[str]:
        tops = sorted({self._folder(key) for key in self.scan.keys})
        if "" in tops or len(tops) < 2:
            raise ValueError(
                f"data.vocabulary is 'classes', but {self.scan.root} has no folder of pictures for each class "
                f"(found {', '.join(map(repr, tops[:_NAMES_SHOWN]))}); lay it out as CLASS/NAME.jpg, or as "
                f"{self._spec.split}/CLASS/NAME.jpg and {self._spec.eval_split}/CLASS/NAME.jpg."
            )
        return tops

    def _folder(self, key: str) -> str:
        """The class of a picture: the name of the folder that it lies in; "" if that is a split's or the data's."""
        folders = key.split("/")[:-1]
        if folders and folders[0] in (self._spec.split, self._spec.eval_split):
            folders = folders[1:]
        return printable(folders[-1]) if folders else ""

    def class_names(self) -> list[str]:
        """The names of the classes' folders, in alphabetical order."""
        return self._classes

    @property
    def broken(self) -> dict[str, str]:
        """The pictures whose pixels turned out to be broken so far: key -> reason."""
        return {self.key(i): reason for i, reason in self._reader.broken.items()}

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.example(index, (index,))

    def key(self, index: int) -> str:
        """The picture's path below the folder."""
        return self.scan.keys[self._read_from[index]]

    def captions(self) -> Iterator[str]:
        """Every caption of the split."""
        return (self.scan.captions[i] for i in self._positions)

    def example(self, index: int, seed: tuple[int, ...]) -> dict[str, Any]:
        """The picture and its caption; `seed` draws the crop and the flip.

        Raises:
          UnusableError: if the picture and all those tried in its place are broken.
        """
        return self._reader.example(index, seed)

    def _name(self, index: int) -> str:
        return printable(self.key(index))

    def _read(self, index: int, seed: tuple[int, ...]) -> dict[str, Any]:
        path = os.path.join(self.scan.root, self.key(index))
        spec = self._spec
        transforms.check_file_size(path)  # the file may have changed since the scan
        with open(path, "rb") as file:  # read here: of a failure inside Pillow nothing would say whose it is
            picture = io.BytesIO(file.read())
        made = {"image": transforms.decode(picture, spec.image_size, crop=spec.crop, flip=spec.flip, seed=seed)}
        if self._has_text:
            made["text"] = self.scan.captions[self._read_from[index]]
        if self._classes:
            made["label"] = self._classes.index(self._folder(self.key(index)))
        return made

    def fingerprint(self) -> str:
        """Changes with any picture's name or size, with any caption, and with what is in `_HASHED` of the files."""
        digest = hashlib.sha256()
        for i in self._positions:
            key, caption = self.scan.keys[i], self.scan.captions[i]
            digest.update(repr((os.fsencode(key), self.scan.sizes[i], caption)).encode("utf-8", "backslashreplace"))
        for i in np.unique(np.linspace(0, len(self) - 1, _HASHED).astype(int)):
            try:
                with open(os.path.join(self.scan.root, self.key(int(i))), "rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            except OSError:  # gone since the scan: another picture stands in for it, and the next scan misses it
                continue
        total = sum(self.scan.sizes[i] for i in self._positions)
        return f"folder:{len(self)} pictures:{total} bytes:{digest.hexdigest()[:16]}"


def main(arguments: list[str] | None = None) -> int:
    """Prints what of a folder is usable and every file that is not."""
    parser = argparse.ArgumentParser(prog="python -m muse_jax.data.folders", description=main.__doc__)
    parser.add_argument("folder")
    parser.add_argument("--decode", action="store_true", help="decode every picture, not only its header")
    parser.add_argument("--text_key", default="text", help="the captions' column in metadata files")
    options = parser.parse_args(arguments)
    try:
        found = _listed(options.folder, options.text_key, min_side=0, max_aspect=0.0, splits=SPLITS)
    except FileNotFoundError as error:
        print(str(error).replace("data.path", "DIR"), file=sys.stderr)
        return 1
    if any(found.captions):
        found = _captioned(found)
    for reason, names in sorted(found.skipped.items()):
        for name in names:
            print(f"{printable(name)}\t{reason}")
    broken = 0
    for key in found.keys if options.decode else ():
        try:
            transforms.decode(os.path.join(found.root, key), 8)
        except transforms.UnusableError as error:
            broken += 1
            print(f"{printable(key)}\t{error}")
    for note in found.notes:
        print(printable(note))
    print(f"{len(found.keys) - broken} pictures are usable{'' if options.decode else ' by their headers'}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
