"""A stand-in for Google Cloud Storage over a folder.

`Files` takes the place of TensorFlow's file system behind etils, through which all but checkpoints' arrays goes;
`serving` speaks the part of the JSON API that tensorstore and Orbax use.
"""

import contextlib
import http.server
import json
import os
import pathlib
import threading
import urllib.parse
from collections.abc import Iterator

from etils.epath import backend, gpath
from orbax.checkpoint._src.path import gcs_utils

BUCKET = "gs://bucket"
ENVIRONMENT = ("TENSORSTORE_GCS_HTTP_URL", "STORAGE_EMULATOR_HOST", "GOOGLE_AUTH_TOKEN_FOR_TESTING")


class Server(http.server.ThreadingHTTPServer):
    """Objects of any bucket are the files of a folder; an object's generation is its file's time of change.

    Attributes:
      fails: answers to come that are 503.
      lost: writes to come that are done and answered 503.
      refused: requests with this in their address are answered 403, if it isn't empty.
    """

    daemon_threads = True

    def __init__(self, folder: pathlib.Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.fails, self.lost, self.refused = folder, 0, 0, ""
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def generation(self, path: pathlib.Path) -> int:
        return path.stat().st_mtime_ns if path.is_file() else 0


@contextlib.contextmanager
def serving(folder: pathlib.Path) -> Iterator[Server]:
    """A server in a thread of its own."""
    server = Server(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def _path(self, key: str) -> pathlib.Path:
        assert ".." not in key.split("/"), key
        return self.server.folder / key

    def _answer(self, code: int, body: bytes = b"", generation: int = 0) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        if generation:
            self.send_header("x-goog-generation", str(generation))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urllib.parse.urlsplit(self.path)
        asked = dict(urllib.parse.parse_qsl(url.query))
        parts = [urllib.parse.unquote(part) for part in url.path.split("/")]
        with self.server.lock:
            if self.server.fails:
                self.server.fails -= 1
                self._answer(503)
            elif self.server.refused and self.server.refused in urllib.parse.unquote(self.path):
                self._answer(403)
            elif "upload" in parts:
                self._write(self._path(asked["name"]), body, asked)
            elif parts[-2] == "b":
                self._answer(200, json.dumps({"name": parts[-1]}).encode())
            elif parts[-1] == "o":
                self._list(asked)
            elif self.command == "DELETE":
                self._delete(self._path(parts[-1]), asked)
            else:
                self._read(self._path(parts[-1]), asked)

    do_GET = do_POST = do_DELETE = _handle

    def _matches(self, found: int, asked: dict[str, str]) -> bool:
        return "ifGenerationMatch" not in asked or int(asked["ifGenerationMatch"]) == found

    def _write(self, path: pathlib.Path, body: bytes, asked: dict[str, str]) -> None:
        found = self.server.generation(path)
        if not self._matches(found, asked):
            return self._answer(412)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.draft")
        draft.write_bytes(body)
        os.replace(draft, path)
        if self.server.generation(path) <= found:
            os.utime(path, ns=(found + 1, found + 1))
        if self.server.lost:
            self.server.lost -= 1
            return self._answer(503)
        made = str(self.server.generation(path))
        return self._answer(200, json.dumps({"name": asked["name"], "generation": made}).encode())

    def _asked_for(self, path: pathlib.Path, asked: dict[str, str]) -> int:
        """The generation of an object that is there as it is asked for; else 0, and that is answered."""
        found = self.server.generation(path)
        if found and self._matches(found, asked):
            return found
        self._answer(412 if found else 404)
        return 0

    def _read(self, path: pathlib.Path, asked: dict[str, str]) -> None:
        found = self._asked_for(path, asked)
        if not found:
            return None
        if asked.get("ifGenerationNotMatch") == str(found):
            return self._answer(304)
        content = path.read_bytes()
        wanted = self.headers.get("Range")
        if not wanted:
            return self._answer(200, content, found)
        first, last = wanted.removeprefix("bytes=").split("-")
        start = int(first) if first else max(len(content) - int(last), 0)
        end = min(int(last), len(content) - 1) if first and last else len(content) - 1
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end}/{len(content)}")
        self.send_header("Content-Length", str(end - start + 1))
        self.send_header("x-goog-generation", str(found))
        self.end_headers()
        return self.wfile.write(content[start : end + 1])

    def _delete(self, path: pathlib.Path, asked: dict[str, str]) -> None:
        if self._asked_for(path, asked):
            path.unlink()
            self._answer(204)

    def _list(self, asked: dict[str, str]) -> None:
        every = (path for path in self.server.folder.rglob("*") if path.is_file())
        names = sorted(path.relative_to(self.server.folder).as_posix() for path in every)
        first, after = asked.get("startOffset", ""), asked.get("endOffset")
        kept = [n for n in names if n.startswith(asked.get("prefix", "")) and n >= first and (not after or n < after)]
        return self._answer(200, json.dumps({"items": [{"name": name} for name in kept]}).encode())

    def log_message(self, *_: object) -> None:
        """Says nothing."""


class Files(backend._OsPathBackend):
    """Objects are files in a folder. Like buckets it has no folders that could be renamed."""

    def __init__(self, folder):
        self._folder = os.fspath(folder)

    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        if name.startswith("_") or not callable(found):
            return found
        return lambda *paths, **settings: self._named(found(*map(self._place, paths), **settings))

    def _place(self, path):
        return f"{self._folder}{str(path).removeprefix(BUCKET)}" if str(path).startswith(BUCKET) else path

    def _named(self, found):
        """What glob found, by its names in the bucket."""
        if not isinstance(found, list):
            return found
        return [name.replace(self._folder, BUCKET, 1) if name.startswith(self._folder) else name for name in found]

    def open(self, path, mode):
        if "r" not in mode:  # folders are parts of names
            os.makedirs(os.path.dirname(path), exist_ok=True)
        return super().open(path, mode)

    def rename(self, old, new):
        """A folder is copied object by object; only what has been damaged, and is no longer needed, may take that."""
        assert not os.path.isdir(old) or "corrupt-" in new, "a bucket has no folders to rename"
        os.rename(old, new)


@contextlib.contextmanager
def standing_in(folder: pathlib.Path) -> Iterator[Server]:
    """While it does, gs://bucket is this folder, in this process."""
    before = backend.tf_backend, gpath._GCS_BACKENDS, gpath._is_zonal_gcs_bucket
    environment = {name: os.environ.get(name) for name in ENVIRONMENT}
    with serving(folder) as server:
        try:
            use(folder, server.url)
            yield server
        finally:
            backend.tf_backend, gpath._GCS_BACKENDS, gpath._is_zonal_gcs_bucket = before
            for name, value in environment.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def use(folder: str | os.PathLike, url: str) -> None:
    """From now on gs://bucket is this folder, which a server serves at `url`."""
    os.environ.update(zip(ENVIRONMENT, (url, url, "any"), strict=True))
    gcs_utils.get_bucket.cache_clear()
    files = Files(folder)
    backend.tf_backend, gpath._GCS_BACKENDS, gpath._is_zonal_gcs_bucket = files, {files}, lambda _: False
