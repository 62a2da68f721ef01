"""Reading a checkpoint's files: what is compared before and after, by runs and by those that load a stage."""

import json
import os
import random
import re
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from muse_jax.training import trees

FORMAT = 1
PAUSES = (0.2, 0.5, 1.0, 2.0, 4.0)  # seconds between two tries to read what can't be read at the moment
# What says nothing about the checkpoint itself, and must not set a good one aside.
OURS = (PermissionError, MemoryError, KeyboardInterrupt)
_GONE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
# How TensorStore and buckets' clients say that storage doesn't answer or the system refused; 2, 20 and 21 are `_GONE`.
_OUTAGE = re.compile(
    r"UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED|UnavailableError|DeadlineExceededError|HttpError"
    r"|Input/output error|os_error_code='(?!(2|20|21)')"
)


class CheckpointError(RuntimeError):
    """No checkpoint could be written, or none of those that are there can be used."""


class Damaged(Exception):
    """A checkpoint whose content isn't what was saved."""


def checkpoints_in(workdir: Any) -> epath.Path:
    """Where a run keeps its checkpoints, as an absolute path: Orbax takes no other. A URL is one already."""
    name = os.fspath(workdir)
    return epath.Path(name if "://" in name else os.path.abspath(name)) / "checkpoints"


def steps_in(folder: epath.Path) -> list[int]:
    """The steps that have a checkpoint, intact or not, oldest first. None of them is still being written."""
    if not folder.exists():
        return []
    named = [path for path in folder.iterdir() if re.fullmatch(r"0|[1-9][0-9]*", path.name)]
    if "://" in os.fspath(folder):  # nothing can be renamed there: Orbax writes under the last name, then a mark
        named = [path for path in named if ocp.utils.is_checkpoint_finalized(path)]
    return sorted(int(path.name) for path in named)


def sealed(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The meta with a checksum of itself."""
    return {**meta, "checksum": zlib.crc32(json.dumps(meta, sort_keys=True).encode())}


def read_meta(folder: epath.Path) -> dict[str, Any]:
    """The meta of checkpoints/STEP.

    Raises:
      Damaged: if it is gone, or isn't what was written.
      CheckpointError: if storage fails, or another version of muse_jax wrote it in another format.
    """
    text = attempt((folder / "meta" / "metadata").read_text, folder / "meta" / "metadata")
    try:
        meta = json.loads(text)
        checksum = meta.pop("checksum")
    except Exception as error:
        raise Damaged(f"its meta can't be read ({brief(error)})") from error
    if sealed(meta)["checksum"] != checksum:
        raise Damaged("its meta isn't what was written")
    if meta["format"] != FORMAT:
        raise CheckpointError(f"{folder} has format {meta['format']}; this version of muse_jax reads {FORMAT}.")
    if str(meta["step"]) != folder.name:
        raise Damaged(f"it is that of step {meta['step']}, under another name")
    return meta


def check_structure(folder: epath.Path, name: str, stored: Mapping[str, Any]) -> None:
    """Compares an item's keys, shapes and dtypes with those in the meta before anything is read.

    Orbax by itself restores a part, or casts, without a word.
    """
    metadata = ocp.StandardCheckpointHandler().metadata(folder / name)
    metadata = getattr(metadata, "tree", metadata)
    found = {n: (list(m.shape), np.dtype(m.dtype).name) for n, m in trees.named_leaves(metadata).items()}
    wanted = {n: (list(shape), dtype) for n, (shape, dtype, _) in stored.items()}
    if found != wanted:
        raise Damaged(f"{name} isn't what its meta says: {difference(found, wanted)}")


def difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first leaves that differ, in words."""
    lines = [f"{n} is missing" for n in wanted if n not in found]
    lines += [f"{n} was not expected" for n in found if n not in wanted]
    lines += [f"{n} is {found[n]}, expected {wanted[n]}" for n in wanted if n in found and found[n] != wanted[n]]
    more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
    return "; ".join(lines[:3]) + more


def brief(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"


def read_arrays(folder: epath.Path, item: str, leaves: Mapping[str, jax.ShapeDtypeStruct], stored: Any) -> dict:
    """{name: jax.Array} of an item of checkpoints/STEP, in the shardings of `leaves`.

    Raises:
      Damaged: if an array isn't there whole. Fingerprints are for the caller to compare.
      CheckpointError: if storage fails.
    """

    def read() -> dict:
        check_structure(folder, item, stored)
        arguments = ocp.args.StandardRestore(trees.nest(leaves))
        return trees.named_leaves(ocp.StandardCheckpointHandler().restore(folder / item, args=arguments))

    return attempt(read, folder / item)


def read_numpy(folder: epath.Path, item: str, stored: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """{name: array} of an item of checkpoints/STEP on the host, with its fingerprints verified.

    Raises:
      Damaged: if an array isn't there whole or isn't what was saved.
      CheckpointError: if storage fails.
    """

    def read() -> dict:
        check_structure(folder, item, stored)
        arguments = trees.nest({name: ocp.RestoreArgs(restore_type=np.ndarray) for name in stored})
        handler = ocp.PyTreeCheckpointHandler()
        return trees.named_leaves(handler.restore(folder / item, args=ocp.args.PyTreeRestore(restore_args=arguments)))

    found = {name: np.asarray(leaf) for name, leaf in attempt(read, folder / item).items()}
    for name, leaf in found.items():
        if trees.fingerprint_numpy(leaf) != stored[name][2]:
            raise Damaged(f"{item}/{name} isn't what was saved")
    return found


def attempt(read: Callable[[], Any], path: epath.Path) -> Any:
    """Calls `read`, which reads `path`, again after each of `PAUSES` while storage fails.

    Raises:
      Damaged: if what is read is gone or no longer whole. It is read twice: one such read may be an outage's work.
      CheckpointError: if storage fails to the end, which says nothing about the checkpoint.
    """
    tries = damaged = 0
    while True:
        try:
            return read()
        except (Damaged, *OURS):
            raise
        except Exception as error:
            tries += 1
            damaged += not _is_outage(error)
            if damaged > 1:
                raise Damaged(f"{path.name} can't be read ({brief(error)})") from error
            if tries > len(PAUSES):
                raise CheckpointError(
                    f"{path} can't be read ({brief(error)}), also after {len(PAUSES)} more tries. Its checkpoint was "
                    "left as it is; start again when the storage is back."
                ) from error
        time.sleep(PAUSES[tries - 1] * random.uniform(0.5, 1.5))  # hosts that failed together try again apart


def _is_outage(error: BaseException) -> bool:
    """Whether a read failed as storage did, and not by what it found there or didn't."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and not isinstance(cause, _GONE):
            return True
        if _OUTAGE.search(f"{type(cause).__name__}: {cause}"):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
