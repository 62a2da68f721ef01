"""Captions of the pictures of a folder: name.txt, metadata.jsonl, metadata.csv."""

import csv
import errno
import io
import json
import os
from collections.abc import Iterator
from typing import Any

MAX_CAPTION_BYTES = 1 << 20
METADATA = ("metadata.csv", "metadata.jsonl")


class Captions:
    """The captions of a folder's pictures."""

    def __init__(self, root: str, keys: frozenset[str], text_key: str):
        self.notes: list[str] = []
        self._root = root
        self._keys = keys
        self._text_key = text_key
        self._replaced = 0  # captions with bytes that are no text
        self._tables = {}  # folder -> {key: caption}
        for key in sorted(keys):
            folder, name = os.path.split(key)
            if name in METADATA and folder not in self._tables:
                self._tables[folder] = self._table(folder, key)
            elif name in (*METADATA, "metadata.parquet"):
                self.notes.append(f"{key} is not read (one metadata.csv or metadata.jsonl a folder).")

    def lists(self, key: str) -> bool:
        """Whether a metadata file names the picture."""
        return any(key in table for table in self._tables.values())

    def of(self, key: str) -> str:
        """The caption, white space collapsed; "" if there is none."""
        stem = os.path.splitext(key)[0]
        for beside in (name for name in (stem + ".txt", stem + ".TXT") if name in self._keys):
            try:
                return " ".join(self._read(beside).split())
            except OSError as error:
                self.notes.append(f"{beside} cannot be read ({error.strerror}).")
        folder = os.path.dirname(key)
        while True:
            if key in self._tables.get(folder, ()):
                return " ".join(self._tables[folder][key].split())
            if not folder:
                return ""
            folder = os.path.dirname(folder)

    def finish(self) -> list[str]:
        """The notes, with what is counted over all files."""
        if self._replaced:
            self.notes.append(f"{self._replaced} caption files are not UTF-8; the odd bytes are replaced.")
        return self.notes

    def _read(self, key: str, limit: int = MAX_CAPTION_BYTES) -> str:
        path = os.path.join(self._root, key)
        if not os.path.isfile(path):  # a pipe would block for ever
            raise OSError(errno.EINVAL, "not a regular file")
        with open(path, "rb") as file:
            data = file.read(limit)
        text = decoded(data)
        self._replaced += "\ufffd" in text
        return text

    def _table(self, folder: str, key: str) -> dict[str, str]:
        """{picture's key: caption} of a metadata file; rows that cannot be used are noted."""
        try:
            text = self._read(key, limit=-1)
            rows = _json_rows(text) if key.endswith(".jsonl") else _csv_rows(text)
        except OSError as error:
            self.notes.append(f"{key} cannot be read ({error.strerror}).")
            return {}
        table, broken, missing, outside, columns = {}, 0, [], [], set()
        for row in rows:
            columns.update(row or ())
            if not row or not isinstance(row.get("file_name"), str) or not isinstance(row.get(self._text_key), str):
                broken += 1
                continue
            picture = os.path.normpath(os.path.join(folder, row["file_name"])).replace(os.sep, "/")
            if folder and not picture.startswith(f"{folder}/"):
                outside.append(row["file_name"])
            elif picture not in self._keys:
                missing.append(row["file_name"])
            else:
                table.setdefault(picture, row[self._text_key])
        if broken:
            given = ", ".join(sorted(map(str, columns))) or "none"
            wanted = f"file_name and {self._text_key}"
            self.notes.append(f"{key}: {broken} rows without {wanted} as strings (columns: {given}).")
        if missing:
            self.notes.append(f"{key}: {len(missing)} rows name files that are not there ({missing[0]}, ...).")
        if outside:
            self.notes.append(f"{key}: {len(outside)} rows name files outside its folder ({outside[0]}, ...).")
        return table


def decoded(data: bytes) -> str:
    """A caption file's text: UTF-16 where it starts with that mark, else UTF-8; what is neither is replaced."""
    return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig", "replace")


def _json_rows(text: str) -> Iterator[dict[str, Any] | None]:
    """The objects of a .jsonl text; None for a line that is none."""
    for line in text.split("\n"):  # splitlines would also split within strings, at U+2028
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield row if isinstance(row, dict) else None


def _csv_rows(text: str) -> Iterator[dict[str, Any] | None]:
    """The rows of a .csv text with a header; None for one that cannot be read."""
    reader = csv.DictReader(io.StringIO(text.replace("\x00", ""), newline=""))
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error:
            row = None
        yield row
