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
from muse_jax.sampling import pipeline, sampler
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
    """
    if isinstance(spec.model, specs.PaellaSpec):
        raise specs.SpecError(
            "model.name is 'paella', whose sampler can't be compiled ahead of time; try --mode=train."
        )
    where = SingleDeviceSharding(device)
    stages = {"base": spec}
    if isinstance(spec.model, specs.SuperResSpec):
        stages = {"base": ahead.stage_spec(base, configs), "superres": spec}
    networks = {name: parameters(predictors.from_spec(stage.model), stage, where) for name, stage in stages.items()}
    shared = {"text_encoder": networks["base"]["text_encoder"]} if "text_encoder" in networks["base"] else {}
    for network in networks.values():  # one text encoder serves all
        network.update(shared)
    judge = ahead.stage_spec(decoder or spec.task.tokenizer, configs)
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
    guided = spec.sample.guidance_scale != 1
    tokens, *_ = _arguments(spec, batch)
    ids, mask = _arguments(spec, batch * (1 + guided))[1:3]
    known = jax.ShapeDtypeStruct(tokens.shape, bool)
    seeds = jax.ShapeDtypeStruct((batch,), jnp.uint32)
    settings = dataclasses.asdict(spec.sample)
    plan = sampler.make_plan(tokens=tokens.shape[1], grid=spec.model.grid, **settings)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=where),
        (ids, mask, low, tokens, known, seeds, None, plan),  # not between two prompts
    )
    static = dict(spec=spec.model, rule=None, stream=stream, guided=guided, history=False)
    args = (params, *shapes)
    return Lowered(
        pipeline._fill.lower(*args, **static), flops.count(functools.partial(pipeline._fill, **static), *args)
    )
