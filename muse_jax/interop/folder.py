"""The folder that `import_weights` writes, and how a run opens it.

`params.safetensors` holds the parameters under this project's names, `weights.json` what they are and
each one's fingerprint. A text encoder's folder may also hold `spiece.model`, its vocabulary. It is
written one block of a tensor at a time and appears only when it is whole; it is read in slices, so
that each process reads no more than its devices hold.
"""

import dataclasses
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from muse_jax import specs
from muse_jax.interop import tensors
from muse_jax.interop.tensors import WeightsError
from muse_jax.training import trees

FORMAT = 1
PARAMS, MANIFEST, VOCABULARY = "params.safetensors", "weights.json", "spiece.model"
_ABANDONED = 3600  # seconds
DTYPES = {"source": None, "float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter to be written.

    Attributes:
      name, shape: ours.
      dtype: of what `blocks` gives.
      blocks: gives the parameter piece by piece, in the order of its memory, each small and after the name of the
        tensor that it is from.
      narrow: whether it may be stored in bfloat16; what is small and sensitive stays float32.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: Callable[[], Iterator[tuple[str, np.ndarray]]]
    narrow: bool = True


@dataclasses.dataclass(frozen=True)
class Converted:
    """Weights under our names, none of them read yet.

    Attributes:
      kind: "text_encoder" or "lpips".
      leaves: the parameters.
      model: the fields of the model's spec, for the manifest.
      vocabulary: the bytes of its SentencePiece model, or None.
    """

    kind: str
    leaves: Sequence[Leaf]
    model: Mapping[str, Any]
    vocabulary: bytes | None = None


def write(out: Any, converted: Converted, origin: Mapping[str, str], dtype: str = "source") -> dict[str, Any]:
    """Writes the folder, whole or not at all; one that `write` made before is replaced.

    Args:
      out: its parents are made if need be; what a link leads to is written. In a bucket, which can't rename
        folders, it is whole once its manifest is, which is the last to be replaced.
      converted: what to write; read as it is written.
      origin: where it is from, for the manifest.
      dtype: a name in `DTYPES`; "source" keeps float32 and bfloat16, and widens float16.

    Returns:
      The manifest.

    Raises:
      WeightsError: if a tensor can't be read or isn't finite, or something else is in the way.
    """
    out = epath.Path(out if _in_bucket(out) else os.path.realpath(out))
    _check_replaceable(out, converted.vocabulary)
    _sweep(out)
    name = f".{out.name}.{uuid.uuid4().hex[:8]}"
    draft, previous = (out.parent / f"{name}.{end}" for end in ("draft", "previous"))
    draft.mkdir(parents=True)
    try:
        written = _write_params(draft / PARAMS, converted.leaves, DTYPES[dtype], origin.get("path", out.name))
        if converted.vocabulary is not None:
            (draft / VOCABULARY).write_bytes(converted.vocabulary)
        manifest = {"format": FORMAT, "kind": converted.kind, "origin": dict(origin)}
        manifest |= {"model": dict(converted.model), "tensors": written}
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        if _in_bucket(out):
            _replace_objects(out, draft)
        else:
            _replace(out, draft, previous)
    finally:
        if draft.exists():
            draft.rmtree()
    return manifest


def _replace(out: epath.Path, draft: epath.Path, previous: epath.Path) -> None:
    """Moves the draft to `out`; what was there stays if that fails."""
    if out.exists():
        out.rename(previous)
    try:
        draft.rename(out)
    except BaseException:
        if previous.exists():
            previous.rename(out)
        raise
    if previous.exists():
        previous.rmtree()


def _replace_objects(out: epath.Path, draft: epath.Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / MANIFEST).write_text(json.dumps({"format": FORMAT}))  # ours, and not whole
    for name in (PARAMS, VOCABULARY, MANIFEST):
        if (draft / name).exists():
            (draft / name).replace(out / name)


def _in_bucket(path: Any) -> bool:
    return "://" in os.fspath(path)


def _sweep(out: epath.Path) -> None:
    """Removes drafts of imports that were killed: those in which nothing has been written for long."""
    for draft in out.parent.glob(f".{out.name}.*.draft"):
        newest = max((file.stat().mtime for file in (draft, *draft.iterdir())), default=0)
        if time.time() - newest > _ABANDONED:
            draft.rmtree()


def _check_replaceable(out: epath.Path, vocabulary: bytes | None) -> None:
    """Refuses a folder with anything that isn't from an earlier import, or that this one wouldn't bring again."""
    if not out.exists():
        return
    if not out.is_dir():
        raise WeightsError(f"{out} is a file; name a folder.")
    held = {file.name for file in out.iterdir()}
    others = sorted(held - {PARAMS, MANIFEST, VOCABULARY})
    if others or (held and MANIFEST not in held):
        found = f" ({others[0]})" if others else ""
        raise WeightsError(f"{out} holds something else than imported weights{found}; name another folder.")
    if VOCABULARY in held and (out / VOCABULARY).read_bytes() != vocabulary:
        raise WeightsError(
            f"{out} holds a {VOCABULARY} that {'differs' if vocabulary else 'does not come'} with these weights and "
            "would be lost; move it away, or name another folder."
        )


def _write_params(path: epath.Path, leaves: Sequence[Leaf], dtype: np.dtype | None, origin: str) -> dict[str, Any]:
    """Writes a safetensors file from its beginning to its end; {name: shape, dtype, fingerprint}."""
    leaves = sorted(leaves, key=lambda leaf: leaf.name)
    stored = {leaf.name: _stored_dtype(leaf, dtype) for leaf in leaves}
    header, at = {}, 0
    for leaf in leaves:
        end = at + math.prod(leaf.shape) * stored[leaf.name].itemsize
        code = tensors.CODES[stored[leaf.name].name]
        header[leaf.name] = {"dtype": code, "shape": list(leaf.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 64 + 56)  # the data begin at a multiple of 64 bytes
    written = {}
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for leaf in leaves:
            kept = stored[leaf.name]
            fingerprint = _write_leaf(file, leaf, kept, origin)
            written[leaf.name] = {"shape": list(leaf.shape), "dtype": kept.name, "fingerprint": fingerprint}
    return written


def _stored_dtype(leaf: Leaf, dtype: np.dtype | None) -> np.dtype:
    if dtype is None:
        return leaf.dtype if leaf.dtype in (DTYPES["float32"], DTYPES["bfloat16"]) else DTYPES["float32"]
    return dtype if leaf.narrow else DTYPES["float32"]


def _write_leaf(file: Any, leaf: Leaf, dtype: np.dtype, origin: str) -> int:
    done = fingerprint = 0
    for source, block in leaf.blocks():
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused
            kept = np.ascontiguousarray(block, dtype)
        if not np.isfinite(kept).all():
            raise WeightsError(
                f"{origin}: {source} has values that are not finite in {dtype.name}; expected finite ones. Nothing is "
                "written."
            )
        fingerprint += trees.fingerprint_numpy(kept, first=done)
        file.write(kept.reshape(-1).view(np.uint8).data)
        done += kept.size
    if done != math.prod(leaf.shape):
        raise WeightsError(f"{leaf.name}: {done} values were read; expected {math.prod(leaf.shape)}.")
    return fingerprint % 2**32


def read_manifest(folder: Any) -> dict[str, Any]:
    """The manifest of an imported folder.

    Raises:
      WeightsError: if there is none, or not one that this version can read.
    """
    path = epath.Path(folder) / MANIFEST
    if not path.exists():
        raise WeightsError(f"{folder} has no {MANIFEST}; name a folder that import_weights wrote.")
    try:
        manifest = json.loads(path.read_text())
        version = manifest["format"]
        _ = manifest["kind"], manifest["model"], manifest["tensors"]
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path} is damaged ({error!r}); import the weights again.") from error
    if version != FORMAT:
        raise WeightsError(f"{path} has format {version!r}; this version reads {FORMAT}. Import the weights again.")
    return manifest


def text_encoder_spec(folder: Any) -> specs.TextEncoderSpec:
    """The spec of the text encoder in a folder, frozen, with `weights` naming the folder.

    Raises:
      WeightsError: if the folder holds none.
    """
    manifest = read_manifest(folder)
    if manifest["kind"] != "text_encoder":
        raise WeightsError(f"{folder} holds {manifest['kind']} weights; expected a text encoder's.")
    return specs.TextEncoderSpec(**manifest["model"], trainable=False, weights=os.fspath(folder))


def open_params(folder: Any) -> dict[str, tensors.SafeTensor]:
    """{name: tensor not yet read} of `params.safetensors`, with the manifest's fingerprints if it has one.

    Raises:
      WeightsError: if the file is damaged, or not the one that the manifest was written with.
    """
    folder = epath.Path(folder)
    found = tensors.open_safetensors(folder / PARAMS)
    if not (folder / MANIFEST).exists():
        return found
    expected = read_manifest(folder)["tensors"]
    tensors.check(found, {name: tuple(entry["shape"]) for name, entry in expected.items()}, str(folder / PARAMS))
    for name, entry in expected.items():
        if found[name].dtype.name != entry["dtype"]:
            raise WeightsError(f"{folder}: {name} has dtype {found[name].dtype.name}; expected {entry['dtype']}.")
        found[name].fingerprint = entry["fingerprint"]
    return found
