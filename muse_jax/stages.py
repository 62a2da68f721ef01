"""From a spec to its task: the one place that maps names to tasks and opens earlier stages."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from muse_jax import specs
from muse_jax.interop import folder as weights
from muse_jax.interop.tensors import WeightsError
from muse_jax.models import lpips, t5, vqgan
from muse_jax.sampling import schedules
from muse_jax.specs import SpecError
from muse_jax.tasks import task as protocol
from muse_jax.tasks.tokenizer import TokenizerTask
from muse_jax.tasks.tokens import Tokenizer, TokensTask
from muse_jax.training import sharding, trees

LoadStage = Callable[[str], Any]


def build_task(spec: specs.Spec, load_stage: LoadStage, abstract: bool = False) -> protocol.Task:
    """The task of a spec, with the earlier stages that it needs.

    Args:
      load_stage: opens a stage folder (`training.checkpoint.load_stage`).
      abstract: frozen networks are shapes, and no weights are read; for compiling ahead of time.

    Raises:
      SpecError: an earlier stage doesn't fit; the message names the mend.
    """
    builders: Mapping[type, Callable[[specs.Spec, LoadStage, bool], protocol.Task]] = {
        specs.TokenizerTaskSpec: _tokenizer_task,
        specs.TokensTaskSpec: _tokens_task,
    }
    return builders[type(spec.task)](spec, load_stage, abstract)


def _tokenizer_task(spec: specs.Spec, load_stage: LoadStage, abstract: bool) -> protocol.Task:
    start = None
    if abstract:  # what is trained on has the shapes of what is trained
        image = jax.ShapeDtypeStruct((1, spec.data.image_size, spec.data.image_size, 3), jnp.float32)
        shapes = jax.eval_shape(lpips.LPIPS().init, jax.random.key(0), image, image)["params"]
        return TokenizerTask(spec, None, sharding.unbox(shapes) if spec.task.perceptual else None)
    if spec.task.init_from:
        start = _tokenizer(load_stage(spec.task.init_from), "task.init_from").params
        _check_start(spec, start)
    return TokenizerTask(spec, start, _perceptual(spec.task) if spec.task.perceptual else None)


def _perceptual(task: specs.TokenizerTaskSpec) -> Any:
    try:
        return lpips.load_lpips(task.perceptual_weights)
    except (OSError, ValueError) as error:
        raise SpecError(
            f"task.perceptual_weights is {task.perceptual_weights!r}: {error} third_party/README.md says how to make "
            "the file; to train without it set task.perceptual=0 and task.perceptual_weights=''."
        ) from error


def _check_start(spec: specs.Spec, start: Any) -> None:
    """Encoder and codebook (and, if all is trained on, the decoder) must have the config's shapes."""
    size = spec.data.image_size
    model = vqgan.VQGAN(spec.model)
    expected = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))["params"]
    for name in ("encoder", "quantizer") if spec.task.trainable == "decoder" else ("encoder", "quantizer", "decoder"):
        _check_shapes(f"task.init_from {spec.task.init_from!r}: {name}", expected[name], start[name])


def _tokens_task(spec: specs.Spec, load_stage: LoadStage, abstract: bool) -> protocol.Task:
    model = spec.model
    if spec.task.mask_schedule not in schedules.SCHEDULES:
        known = ", ".join(map(repr, schedules.SCHEDULES))
        raise SpecError(f"task.mask_schedule is {spec.task.mask_schedule!r}; expected one of {known}.")
    tokenizer = _tokenizer(load_stage(spec.task.tokenizer), "task.tokenizer")
    _check_codebook("task.tokenizer", spec.task.tokenizer, tokenizer, model.codebook_size, "model.codebook_size")
    side = spec.data.image_size // tokenizer.spec.factor
    if tuple(model.grid) != (side, side) or spec.data.image_size % tokenizer.spec.factor:
        raise SpecError(
            f"model.grid is {model.grid}, but the tokenizer {spec.task.tokenizer!r} makes {side} x {side} tokens of a "
            f"{spec.data.image_size} x {spec.data.image_size} picture (factor {tokenizer.spec.factor}); "
            f"set model.grid=({side}, {side}) or change data.image_size."
        )
    low = None
    if isinstance(model, specs.SuperResSpec):
        path = spec.task.low_tokenizer
        low = _tokenizer(load_stage(path), "task.low_tokenizer")
        _check_codebook("task.low_tokenizer", path, low, model.low_codebook_size, "model.low_codebook_size")
        for low_side in model.low_grid:
            if spec.data.image_size % (low_side * low.spec.factor):
                raise SpecError(
                    f"model.low_grid {model.low_grid} of the tokenizer {path!r} (factor {low.spec.factor}) is a "
                    f"picture of {low_side * low.spec.factor} pixels, which does not divide data.image_size "
                    f"{spec.data.image_size}; change one of them."
                )
    if abstract:  # a start from codes that are shapes has the shapes of any other
        spec = dataclasses.replace(spec, task=dataclasses.replace(spec.task, codebook_init=False))
    return TokensTask(spec, tokenizer, low, _text_encoder(spec, abstract))


def _tokenizer(stage: Any, key: str) -> Tokenizer:
    if not isinstance(stage.spec.model, specs.VQGANSpec):
        raise SpecError(f"{key} is {stage.path!r}, which holds a {type(stage.spec.model).__name__}; name a tokenizer.")
    return Tokenizer(stage.spec.model, {name: stage.params[name] for name in ("encoder", "quantizer", "decoder")})


def _check_codebook(key: str, path: str, tokenizer: Tokenizer, size: int, name: str) -> None:
    if tokenizer.spec.codebook_size != size:
        raise SpecError(
            f"{key} {path!r} has {tokenizer.spec.codebook_size} codes, but {name} is {size}; "
            f"set {name}={tokenizer.spec.codebook_size} or name another tokenizer."
        )


def _text_encoder(spec: specs.Spec, abstract: bool) -> Any:
    """The frozen text encoder's parameters, {} where batches have its embeddings, None where there is none to freeze.

    They are tensors that have not been read yet: XXL's 4.6B are never whole in one host's memory (see
    `sharding.place`). As shapes, kernels and tables have the model's dtype, which is what
    `import_weights --dtype` is for.
    """
    text = getattr(spec.model, "text", None)
    if text is None or text.trainable:
        return None
    if spec.data.text_embeddings:
        return {}
    ids = jnp.zeros((1, spec.data.text_length), jnp.int32)
    expected = jax.eval_shape(t5.from_spec(text).init, jax.random.key(0), ids, ids > 0)["params"]
    if abstract:
        return jax.eval_shape(lambda tree: _stored_as(spec.model.dtype, tree), sharding.unbox(expected))
    path = os.path.join(text.weights, weights.PARAMS)
    if not epath.Path(path).exists():
        raise SpecError(f"model.text.weights is {text.weights!r}, but there is no {path}; see third_party/README.md.")
    try:
        params = trees.nest(weights.open_params(text.weights))
    except WeightsError as error:
        raise SpecError(f"model.text.weights {text.weights!r}: {error}") from error
    _check_shapes(f"model.text.weights {text.weights!r}", expected, params)
    return params


def _stored_as(dtype: str, params: Any) -> Any:
    """Kernels in the dtype they are multiplied in, and tables too; norms as they are."""

    def stored(name: str, leaf: Any) -> Any:
        return leaf.astype(jnp.dtype(dtype)) if name.split("/")[-1] in ("kernel", "embedding") else leaf

    return trees.map_named(stored, params)


def _check_shapes(what: str, expected: Any, found: Any) -> None:
    """Raises SpecError naming the first parameter whose shape differs or that only one side has."""
    wanted, have = (
        {name: leaf.shape for name, leaf in trees.named_leaves(tree).items()}
        for tree in (sharding.unbox(expected), found)
    )
    for name in sorted(wanted.keys() | have.keys()):
        if wanted.get(name) != have.get(name):
            raise SpecError(
                f"{what}: {name} has shape {have.get(name, 'none, it is missing')}, but the config's model "
                f"has {wanted.get(name, 'no such parameter')}; make the model section that of the weights."
            )
