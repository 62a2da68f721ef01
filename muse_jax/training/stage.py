"""Stage folders: trained parameters that another command can load.

A stage folder is either the workdir of a run, of which the newest whole checkpoint is read (its EMA
if it has one), or a folder with `config.json`, `params.safetensors` and, for models that read text,
`vocabulary.json`.
"""

import contextlib
import dataclasses
import importlib.resources
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from muse_jax import specs
from muse_jax.training import trees

CONFIG, PARAMS, VOCABULARY = "config.json", "params.safetensors", "vocabulary.json"
PACKAGED = "pretrained:"


class StageError(ValueError):
    """A folder that is no stage, or a damaged one; the message says what is wrong with which file."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A loaded stage.

    Attributes:
      spec: of the run that trained it.
      params: nested dict of NumPy arrays; what is stored as float16 is float32 here.
      vocabulary: what `vocabulary.json` holds, or None.
      path: the folder.
      step: at which the parameters were saved.
    """

    spec: specs.Spec
    params: Any
    vocabulary: dict[str, Any] | None
    path: str
    step: int


def load_stage(path: Any) -> Stage:
    """Loads a stage folder, a run's workdir, or "pretrained:NAME", a stage of the packaged pipeline.

    Raises:
      StageError: if the folder isn't there, isn't a stage, or is damaged.
    """
    name, folder = os.fspath(path), folder_of(path)
    if not folder.exists():
        raise StageError(f"there is no folder {name}; train this stage first, or name the folder that holds it.")
    spec, vocabulary = read_description(folder)
    if (folder / PARAMS).exists():
        params, step = _read_safetensors(folder / PARAMS)
    elif (folder / "checkpoints").exists():
        params, step = _newest(folder)
    else:
        raise StageError(f"{name} has neither {PARAMS} nor checkpoints; its training has not saved anything yet.")
    return Stage(spec, trees.nest(params), vocabulary, name, step)


def folder_of(path: Any) -> epath.Path:
    """The folder that a path means; "pretrained:NAME" is in the package."""
    name = os.fspath(path)
    return _packaged(name.removeprefix(PACKAGED)) if name.startswith(PACKAGED) else epath.Path(name)


def save_stage(
    folder: Any, spec: specs.Spec, params: Any, vocabulary: Mapping[str, Any] | None = None, step: int = 0
) -> None:
    """Writes a stage folder, whole or not at all; one that is there is replaced.

    Args:
      folder: its parent is made if need be. In a bucket, which can't rename folders, it is a stage once its
        config.json is there, which is deleted first and written last.
      spec: of the run that trained it.
      params: nested dict of arrays.
      vocabulary: what the text vocabulary's `to_json` gave, for models that read text.
      step: at which the parameters were saved.

    Raises:
      StageError: if the folder is there and holds anything else than a stage.
    """
    check_replaceable(folder)
    if "://" in os.fspath(folder):
        with tempfile.TemporaryDirectory() as scratch:
            _write_stage(pathlib.Path(scratch), spec, params, vocabulary, step)
            _upload(pathlib.Path(scratch), epath.Path(folder))
        return
    folder = pathlib.Path(folder)
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        _write_stage(draft, spec, params, vocabulary, step)
        previous = folder.with_name(f".{folder.name}.{os.getpid()}.previous")
        shutil.rmtree(previous, ignore_errors=True)
        if folder.exists():
            folder.rename(previous)
        draft.rename(folder)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def check_replaceable(folder: Any) -> None:
    """Raises StageError if `save_stage` would replace anything else than a stage folder, a run's workdir for one."""
    folder = epath.Path(os.fspath(folder))
    if folder.exists():
        found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else ["a file"]
        others = [name for name in found if name not in (CONFIG, PARAMS, VOCABULARY)]
        if others:
            raise StageError(
                f"{folder} holds more than a stage that could be replaced: {', '.join(others[:3])}; name a new folder."
            )


def _write_stage(folder: pathlib.Path, spec: specs.Spec, params: Any, vocabulary: Any, step: int) -> None:
    from safetensors import numpy as safetensors

    arrays = {name: np.asarray(leaf, order="C") for name, leaf in trees.named_leaves(params).items()}
    prints = {name: trees.fingerprint_numpy(leaf) for name, leaf in arrays.items()}
    safetensors.save_file(
        arrays, folder / PARAMS, metadata={"fingerprints": json.dumps(prints), "step": str(int(step))}
    )
    write_json(folder / CONFIG, specs.to_config(spec))
    if vocabulary is not None:
        write_json(folder / VOCABULARY, vocabulary)


def _upload(files: pathlib.Path, folder: epath.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, PARAMS, VOCABULARY):
        (folder / name).unlink(missing_ok=True)
    for name in (PARAMS, VOCABULARY, CONFIG):
        if (files / name).exists():
            epath.Path(files / name).copy(folder / name)


@contextlib.contextmanager
def _local(path: epath.Path) -> Iterator[str]:
    """A path that libraries which read local files only can read."""
    if "://" not in os.fspath(path):
        yield os.fspath(path)
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield os.fspath(path.copy(os.path.join(scratch, path.name)))


def write_json(path: Any, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    path = epath.Path(path)
    draft = path.parent / f".{path.name}.draft"
    draft.write_text(json.dumps(value, indent=1) + "\n")
    draft.replace(path)


def _packaged(stage: str) -> epath.Path:
    folder = epath.Path(str(importlib.resources.files("muse_jax"))) / "pretrained"
    if not (folder / "pipeline.json").exists():
        raise StageError(f"{PACKAGED}{stage}: no pipeline is packaged in {folder}; name a stage folder of your own.")
    stages = _read_json(folder / "pipeline.json")["stages"]
    if stage not in stages:
        raise StageError(f"{PACKAGED}{stage}: the packaged pipeline has the stages {', '.join(sorted(stages))}.")
    return folder / stages[stage]


def _read_json(path: epath.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, not an object")
        return found
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StageError(f"{path} is missing; {path.parent} is no stage folder.") from error
    except ValueError as error:
        raise StageError(f"{path} is damaged: {error}.") from error


def read_description(path: Any) -> tuple[specs.Spec, dict[str, Any] | None]:
    """The spec and the vocabulary (None without text) of a stage folder.

    Raises:
      StageError: if they can't be read.
    """
    folder = epath.Path(os.fspath(path))
    config = _read_json(folder / CONFIG)
    vocabulary = _read_json(folder / VOCABULARY) if (folder / VOCABULARY).exists() else None
    try:
        return specs.from_stored(config), vocabulary
    except specs.SpecError as error:
        raise StageError(f"{folder / CONFIG} doesn't fit this version of muse_jax: {error}") from error


def _read_safetensors(path: epath.Path) -> tuple[dict[str, np.ndarray], int]:
    from safetensors import safe_open

    try:
        with _local(path) as local, safe_open(local, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        prints = json.loads(metadata.get("fingerprints", "{}"))
        step = int(metadata.get("step", "0"))
    except Exception as error:
        raise StageError(f"{path} is damaged or no safetensors file: {error}.") from error
    if prints and set(prints) != set(arrays):
        raise StageError(f"{path} is damaged: it doesn't hold the arrays that were saved.")
    for name, value in prints.items():
        if trees.fingerprint_numpy(arrays[name]) != value:
            raise StageError(f"{path} is damaged: {name} isn't what was saved.")
    # float16 is for a small file; nothing is computed or trained in it.
    return {n: leaf.astype(np.float32) if leaf.dtype == np.float16 else leaf for n, leaf in arrays.items()}, step


def _newest(workdir: epath.Path) -> tuple[dict[str, np.ndarray], int]:
    """Parameters of the newest whole checkpoint; what is damaged is passed over, and left to its run."""
    # Orbax takes a while to import and packaged stages don't need it.
    from muse_jax.training import reading

    folder = reading.checkpoints_in(workdir)
    for step in reversed(reading.steps_in(folder)):
        try:
            meta = reading.read_meta(folder / str(step))
            item = "ema" if "ema" in meta["leaves"] else "params"
            return reading.read_numpy(folder / str(step), item, meta["leaves"][item]), step
        except reading.Damaged as error:
            logging.warning("the checkpoint %s is damaged (%s); trying the one before", folder / str(step), error)
    raise StageError(f"{folder} holds no whole checkpoint; train this stage first, or for longer.")
