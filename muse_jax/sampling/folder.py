"""The pipeline folder: `pipeline.json` and one stage folder for each stage from prompt to picture."""

import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

from absl import logging
from etils import epath

from muse_jax import specs

FORMAT = 1
FILE = "pipeline.json"
NEEDED = ("tokenizer_low", "base")
HIGH = ("tokenizer_high", "superres")  # both, or neither: then pictures have one resolution, the base model's
STAGES = ("tokenizer_low", "tokenizer_high", "base", "superres", "decoder")  # in the order of training
MODELS = {
    "tokenizer_low": (specs.VQGANSpec,),
    "tokenizer_high": (specs.VQGANSpec,),
    "base": (specs.BaseSpec, specs.MaskGITSpec, specs.PaellaSpec),
    "superres": (specs.SuperResSpec,),
    "decoder": (specs.VQGANSpec,),  # fine-tuned; without it the finest tokenizer's own is used
}
STAGE_FILES = ("config.json", "params.safetensors", "vocabulary.json")  # of each stage's folder


class PipelineError(ValueError):
    """A pipeline folder that cannot be used, or stages that don't fit; the message names the mend."""


def read(folder: str | os.PathLike[str]) -> tuple[dict[str, epath.Path], dict[str, Any]]:
    """Where a pipeline folder's stages are, and its manifest. The folder may be in a bucket (gs://).

    Raises:
      PipelineError: if it is no pipeline folder, or one that this version cannot read.
    """
    folder = epath.Path(folder)
    if not (folder / FILE).exists():
        where = "is a folder without" if folder.is_dir() else "is not there, so it has no"
        raise PipelineError(
            f"{folder} {where} {FILE}; name a folder that the quickstart or MusePipeline.assemble wrote."
        )
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        version, manifest = content["format"], dict(content.get("manifest") or {})
        stages = {name: os.fspath(where) for name, where in content["stages"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PipelineError(f"{folder / FILE} is damaged ({error!r}); write the pipeline again.") from error
    if version != FORMAT:
        raise PipelineError(
            f"{folder / FILE} has format {version!r}, and this version of muse_jax reads {FORMAT}; "
            "install the version that wrote it, or assemble the pipeline again from its stages."
        )
    _check_names(stages, str(folder))
    gone = [name for name, where in stages.items() if not (folder / where).exists()]
    if gone:
        raise PipelineError(
            f"{folder} lacks the folders of {', '.join(gone)}; copy the whole folder, or write it again."
        )
    return {name: folder / where for name, where in stages.items()}, manifest


def write(
    folder: str | os.PathLike[str],
    stages: Mapping[str, Any],
    manifest: Mapping[str, Any],
    save: Callable[[pathlib.Path, Any], None],
) -> None:
    """Writes a pipeline folder whole or not at all; a pipeline that is there is replaced.

    If that one's folder holds more, such as figures of it, it is kept beside under the next free "FOLDER.1".

    Args:
      folder: its parent is made if need be; of a link, what it leads to. In a bucket, which can't rename folders,
        it is a pipeline once its pipeline.json is there, which is deleted first and written last.
      stages: name -> anything that `save` can write.
      manifest: of the pipeline's making (command, seed, versions, figures); JSON values.
      save: (folder, stage) writes a stage folder.

    Raises:
      PipelineError: if something else is in the way.
    """
    content = {"format": FORMAT, "stages": {name: name for name in stages}, "manifest": dict(manifest)}
    text = json.dumps(content, indent=1) + "\n"
    if "://" in os.fspath(folder):
        _write_in_bucket(epath.Path(folder), stages, text, save)
        return
    folder = pathlib.Path(os.path.realpath(folder))
    others = _others(folder)
    draft, previous = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("draft", "previous"))
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        for name, stage in stages.items():
            save(draft / name, stage)
        (draft / FILE).write_text(text, encoding="utf-8")
        if folder.exists():
            folder.rename(previous)
        draft.rename(folder)
        if others:
            beside = (folder.with_name(f"{folder.name}.{number}") for number in itertools.count(1))
            kept = previous.rename(next(path for path in beside if not path.exists()))
            logging.warning("The pipeline before is now %s, since its folder also held %s.", kept, ", ".join(others))
        else:
            shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _others(folder: pathlib.Path) -> list[str]:
    """What a pipeline's folder holds beside what `write` has written.

    Raises:
      PipelineError: if it is no pipeline's folder, and not empty.
    """
    if not folder.exists():
        return []
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {"a file"}
    if names and not {FILE, "base"} <= names:
        raise PipelineError(f"{folder} holds something else than a pipeline; name another folder.")
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}
    ours = {pathlib.Path(FILE), *(pathlib.Path(stage, file) for stage in STAGES for file in STAGE_FILES)}
    return sorted(map(str, files - ours))


def _write_in_bucket(
    folder: epath.Path, stages: Mapping[str, Any], text: str, save: Callable[[Any, Any], None]
) -> None:
    (folder / FILE).unlink(missing_ok=True)
    for name, stage in stages.items():
        save(folder / name, stage)
    (folder / FILE).write_text(text)


def check(stages: Mapping[str, specs.Spec]) -> None:
    """Refuses stages that cannot work together.

    Raises:
      PipelineError: naming the two that don't fit.
    """
    _check_names(stages, "the pipeline")
    for name, spec in stages.items():
        if not isinstance(spec.model, MODELS[name]):
            expected = " or ".join(model.__name__.removesuffix("Spec") for model in MODELS[name])
            raise PipelineError(
                f"{name} is a {type(spec.model).__name__.removesuffix('Spec')} model; "
                f"expected {expected}. Name the folder of the {name} stage."
            )
    low, base = (stages[name].model for name in NEEDED)
    _same("base", "codes", base.codebook_size, "tokenizer_low", low.codebook_size)
    if "superres" in stages:
        if isinstance(base, specs.PaellaSpec):
            raise PipelineError("base is a Paella model, whose pictures have one resolution; leave superres out.")
        high, superres = (stages[name].model for name in HIGH)
        _same("superres", "codes", superres.codebook_size, "tokenizer_high", high.codebook_size)
        _same("superres", "low-resolution codes", superres.low_codebook_size, "base", base.codebook_size)
        _same("superres", "low-resolution tokens", superres.low_grid, "base", base.grid)
    if "decoder" in stages:
        decoder, name = stages["decoder"].model, finest(stages)
        tokenizer = stages[name].model
        _same("decoder", "codes", decoder.codebook_size, name, tokenizer.codebook_size)
        _same("decoder", "dimensions a code", decoder.code_dim, name, tokenizer.code_dim)
        _same("decoder", "pixels a token", decoder.factor, name, tokenizer.factor)


def finest(stages: Mapping[str, Any]) -> str:
    """The tokenizer of the pictures that a pipeline makes in the end."""
    return "tokenizer_high" if "superres" in stages else "tokenizer_low"


def needed(stages: Mapping[str, Any]) -> tuple[str, ...]:
    """The stages that a pipeline of these needs: with one of the high resolution's, both."""
    return (*NEEDED, *HIGH) if any(name in stages for name in HIGH) else NEEDED


def _check_names(stages: Mapping[str, Any], owner: str) -> None:
    missing = [name for name in needed(stages) if name not in stages]
    if missing:
        raise PipelineError(f"{owner} lacks the stage {' and '.join(missing)}; it needs {', '.join(needed(stages))}.")
    strange = [name for name in stages if name not in STAGES]
    if strange:
        raise PipelineError(f"{owner} has a stage {strange[0]!r}; expected {', '.join(STAGES)}.")


def _same(name: str, what: str, value: Any, other: str, expected: Any) -> None:
    if value != expected:
        raise PipelineError(
            f"{name} has {value} {what}, but {other} has {expected}: they were not trained together. "
            f"Use the {other} that {name} was trained with, or train {name} again."
        )
