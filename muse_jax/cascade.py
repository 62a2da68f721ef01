"""The decoding loops that `muse_jax.sample` runs, as shapes, to be compiled for one chip."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from muse_jax import ahead, flops, specs
from muse_jax.models import predictors, vqgan
from muse_jax.sampling import folder, pipeline, sampler
from muse_jax.training import sharding

DTYPE = jnp.bfloat16  # of everything that stays on the chip


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A lowered program and the FLOPs that its networks need."""

    program: Any
    model_flops: float


def lower(
    spec: specs.Spec, configs: pathlib.Path, batch: int, device: Any, base: str = "base_3b", decoder: str = ""
) -> tuple[Any, dict[str, Lowered]]:
    """The networks that stay on the chip, as shapes, and the programs in the order in which they run.

    Args:
      spec: a base model: pictures of its tokenizer's size. A super-resolution model: the whole way.
      base: the stage of the base model before a super-resolution model.
      decoder: the stage that makes pictures of tokens; by default the model's own tokenizer.

    Raises:
      specs.SpecError: for a model without such a loop, and stages that don't go together.
    """
    where = SingleDeviceSharding(device)
    stages, judge = _stages(spec, configs, base, decoder)
    networks = {name: parameters(predictors.from_spec(stage.model), stage, where) for name, stage in stages.items()}
    shared = {"text_encoder": networks["base"]["text_encoder"]} if "text_encoder" in networks["base"] else {}
    for network in networks.values():  # one text encoder serves all
        network.update(shared)
    networks["decoder"] = parameters(vqgan.VQGAN(judge.model), judge, where)
    programs, low = {}, None
    for stream, (name, stage) in enumerate(stages.items()):
        programs[name] = _fill(networks[name], stage, batch, low, stream, where)
        low = jax.ShapeDtypeStruct((batch, stage.model.grid[0] * stage.model.grid[1]), jnp.int32, sharding=where)
    ids = jax.ShapeDtypeStruct((batch, *spec.model.grid), jnp.int32, sharding=where)
    decode = functools.partial(pipeline._decode, spec=judge.model)
    programs["decoder"] = Lowered(
        pipeline._decode.lower(networks["decoder"], ids, spec=judge.model),
        flops.count(decode, networks["decoder"], ids),
    )
    unique = {**networks, **{n: {k: v for k, v in networks[n].items() if k not in shared} for n in stages}}
    return unique | shared, programs


def _stages(
    spec: specs.Spec, configs: pathlib.Path, base: str, decoder: str
) -> tuple[dict[str, specs.Spec], specs.Spec]:
    """The models that fill tokens, in their order, and what makes pictures of the last one's."""
    if not isinstance(spec.model, specs.BaseSpec | specs.MaskGITSpec | specs.SuperResSpec):
        raise specs.SpecError(
            f"the config's model is a {_kind(spec)} model, which has no sampler that can be compiled ahead of time; "
            "try --mode=train."
        )
    stages = {"base": spec}
    if isinstance(spec.model, specs.SuperResSpec):
        stages = {"base": _stage("base", base, configs), "superres": spec}
    tokenizers = zip(("tokenizer_low", "tokenizer_high"), stages.values(), strict=False)
    others = {name: _stage(name, stage.task.tokenizer, configs) for name, stage in tokenizers}
    if decoder:
        others["decoder"] = _stage("decoder", decoder, configs)
    try:
        folder.check(stages | others)
    except folder.PipelineError as error:
        raise specs.SpecError(str(error)) from error
    return stages, list(others.values())[-1]


def _stage(name: str, path: str, configs: pathlib.Path) -> specs.Spec:
    spec = ahead.stage_spec(path, configs)
    if not isinstance(spec.model, folder.MODELS[name]):
        raise specs.SpecError(f"{path!r} is a {_kind(spec)} model, which can't be the {name}; name another stage.")
    return spec


def _kind(spec: specs.Spec) -> str:
    return type(spec.model).__name__.removesuffix("Spec")


def parameters(model: Any, spec: specs.Spec, where: Any) -> Any:
    """A model's parameters as they stay on the chip."""
    if isinstance(spec.model, specs.VQGANSpec):
        args = [jax.ShapeDtypeStruct((1, spec.model.factor, spec.model.factor, 3), jnp.float32)]
    else:
        args = _arguments(spec, 1)
    params = sharding.unbox(jax.eval_shape(model.init, jax.random.key(0), *args)["params"])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, DTYPE, sharding=where), params)


def _arguments(spec: specs.Spec, batch: int) -> list[jax.ShapeDtypeStruct]:
    def places(grid: tuple[int, int]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, grid[0] * grid[1]), jnp.int32)

    text = [jax.ShapeDtypeStruct((batch, spec.condition_length), dtype) for dtype in (jnp.int32, bool)]
    low = [places(spec.model.low_grid)] if isinstance(spec.model, specs.SuperResSpec) else []
    return [places(spec.model.grid), *text, *low]


def _fill(params: Any, spec: specs.Spec, batch: int, low: Any, stream: int, where: Any) -> Lowered:
    tokens, *_ = _arguments(spec, batch)
    ids, mask = _arguments(spec, batch * 2)[1:3]
    known = jax.ShapeDtypeStruct(tokens.shape, bool)
    seeds = jax.ShapeDtypeStruct((batch,), jnp.uint32)
    guided = spec.sample.guidance_scale != 1
    settings = dataclasses.asdict(spec.sample)
    plan = sampler.make_plan(tokens=tokens.shape[1], grid=spec.model.grid, **settings)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=where),
        (ids, mask, low, tokens, known, seeds, None, plan, guided),  # not between two prompts
    )
    static = dict(spec=spec.model, rule=None, stream=stream, guided=guided, history=False)
    args = (params, *shapes)
    return Lowered(
        pipeline._fill.lower(*args, **static), flops.count(functools.partial(pipeline._fill, **static), *args)
    )
