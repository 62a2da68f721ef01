"""A run without its data, weights and devices: everything as shapes, for what is said of it ahead of time.

Earlier stages are read from their folders where these are there. Where they aren't yet, `runs/NAME` is
taken to be what the config NAME.py beside the run's own config would train.
"""

import importlib.util
import inspect
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from muse_jax import specs, stages
from muse_jax.models import vqgan
from muse_jax.training import sharding, stage, step

V4_POD_CHIPS = 256  # the 512 cores of Muse, section 3; where no number of chips is given


def read_config(path: str | os.PathLike[str]) -> Any:
    """The config of a file, "FILE.py" or "FILE.py:variant".

    Raises:
      specs.SpecError: for what is no config, and a variant that it doesn't have.
    """
    file, _, variant = os.fspath(path).partition(":")
    specs.check_file(file)
    found = importlib.util.spec_from_file_location("muse_jax_config", file)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise specs.SpecError(f"{file} is no config: it has no get_config; name a file of configs/.")
    if not variant:
        return module.get_config()
    if not inspect.signature(module.get_config).parameters:
        raise specs.SpecError(f"this config has no variants; leave out {variant!r}.")
    try:
        return module.get_config(variant)
    except ValueError as error:  # which says what there is
        raise specs.SpecError(str(error)) from error


def stage_spec(path: str, configs: pathlib.Path) -> specs.Spec:
    """The spec of a stage: of its folder, or of the config of its name in the folder `configs`.

    Raises:
      specs.SpecError: if there is neither, or the folder is damaged.
    """
    try:
        folder = stage.folder_of(path)
        if os.path.exists(folder / stage.CONFIG):  # of this machine: a bucket isn't asked
            return stage.read_description(folder)[0]
    except stage.StageError as error:
        raise specs.SpecError(str(error)) from error
    config = configs / f"{pathlib.PurePath(path).name}.py"
    if not config.is_file():
        raise specs.SpecError(f"there is no stage {path}, and no config {config} that would train it.")
    return specs.from_config(read_config(config))


def load_stage(path: str, configs: pathlib.Path) -> stage.Stage:
    """A tokenizer stage whose parameters are shapes."""
    spec = stage_spec(path, configs)
    params = {}
    if isinstance(spec.model, specs.VQGANSpec):
        image = jax.ShapeDtypeStruct((1, spec.model.factor, spec.model.factor, 3), jnp.float32)
        params = jax.eval_shape(vqgan.VQGAN(spec.model).init, jax.random.key(0), image)["params"]
    return stage.Stage(spec, sharding.unbox(params), None, path, 0)


def tokenizers(spec: specs.Spec, configs: pathlib.Path) -> dict[str, specs.VQGANSpec]:
    """{path: spec} of the tokenizers that a run reads."""
    paths = [getattr(spec.task, name, "") for name in ("tokenizer", "low_tokenizer")]
    return {path: stage_spec(path, configs).model for path in paths if path}


def program(spec: specs.Spec, mesh: Any, configs: pathlib.Path) -> step.Program:
    """The program that `train` would run on the mesh, which may be an `AbstractMesh`."""
    task = stages.build_task(spec, lambda path: load_stage(path, configs), abstract=True)
    return step.Program(spec, task, mesh, task.frozen())


def abstract_mesh(spec: specs.MeshSpec, chips: int = V4_POD_CHIPS) -> AbstractMesh:
    """The mesh of so many chips, which need not exist."""
    sizes = [spec.data, spec.fsdp, spec.tensor]
    given = fewest_chips(spec)
    if -1 in sizes:
        if chips % given:
            raise specs.SpecError(f"mesh axes of {given} devices don't divide {chips} chips; change mesh.")
        sizes[sizes.index(-1)] = chips // given
    return AbstractMesh(tuple(sizes), sharding.AXES, axis_types=(AxisType.Auto,) * len(sizes))


def fewest_chips(spec: specs.MeshSpec) -> int:
    """What the mesh takes where its axis of -1, if it has one, is 1."""
    return math.prod(size for size in (spec.data, spec.fsdp, spec.tensor) if size > 0)


def batch(spec: specs.Spec) -> Mapping[str, jax.ShapeDtypeStruct]:
    """A batch as the loader makes it."""
    size, length, side = spec.train.batch_size, spec.data.text_length, spec.data.image_size
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {"example_id": ((size,), jnp.int32)}
    text = {"text_mask": ((size, length), bool)}
    if specs.is_precomputed(spec.data):
        low, high = (spec.model.low_grid, 1) if isinstance(spec.model, specs.SuperResSpec) else (spec.model.grid, None)
        shapes["low_tokens"] = ((size, low[0] * low[1]), jnp.int32)
        if high:
            shapes["high_tokens"] = ((size, spec.model.grid[0] * spec.model.grid[1]), jnp.int32)
    else:
        shapes["image"] = ((size, side, side, 3), jnp.uint8)
    if spec.data.text_embeddings:
        # In the dtype in which the model reads them: T5's float32 would double the data for nothing.
        shapes |= text | {"text_embeddings": ((size, length, spec.model.text.width), jnp.dtype(spec.model.dtype))}
    elif length:
        shapes |= text | {"text_ids": ((size, length), jnp.int32)}
    if spec.data.vocabulary == "classes":
        shapes["label"] = ((size,), jnp.int32)
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}
