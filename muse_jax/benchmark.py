"""Times training, decoding and data loading: python -m muse_jax.benchmark [--only=WORDS] [--json].

Each time is held against the rate of a yardstick that is timed right before and right after it, so
that a machine that is slow or busy just then changes little: a large product of two matrices in float32,
or, for the tokenizers, a 3x3 convolution. A stage whose config rounds its products to bfloat16 is held
against a product that is rounded too. A share of 100% would be a network that does nothing but products
at the yardstick's speed.

The work that is counted is the networks' own, as muse_jax/flops.py has it: three forward passes for a
train step, nothing for norms, softmax and activations, nothing for what is computed a second time.
What the optimizer multiplies, as Muon does, counts apart.

    case            what is timed
    train/STAGE     the train step of configs/scenes/STAGE.py: frozen networks, gradients, optimizer
    train/wide      the same of a masked transformer of 256 tokens, 512 wide, 8 layers, batch 8, in float32
    sample/wide     its 18 decoding steps with guidance, batch 1, from text ids to tokens
    decode/STAGE    the decoder of a tokenizer of the scenes
    decode/wide     the decoder of a VQGAN, 64 to 256 channels, f=8, 128x128 pixels, batch 1
    load/STAGE      the train step fed by the loader, as a multiple of its time on a batch in memory
"""

from muse_jax import process

if __name__ == "__main__":
    process.reexec_with_malloc_settings()  # before jax is imported

import dataclasses
import functools
import itertools
import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from muse_jax import data, flops, quickstart, specs, stages
from muse_jax.models import layers, muse, vqgan
from muse_jax.sampling import guidance, sampler
from muse_jax.tasks.tokens import Tokenizer, TokensTask
from muse_jax.training import feed, sharding, signals, step
from muse_jax.training.checkpoint import Stage

STAGES = ("tokenizer_low", "tokenizer_high", "base", "superres", "decoder")
TOKENIZERS = ("tokenizer_low", "tokenizer_high", "decoder")


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long and how large; `QUICK` is for tests."""

    rounds: int = 5
    seconds: float = 0.3  # that a timing takes at least
    variant: str = ""  # of the scenes' configs
    yardstick: int = 2048  # side of the matrices
    width: int = 512
    layers: int = 8
    grid: int = 16
    steps: int = 18
    channels: int = 64
    loaded: int = 6  # train steps that load/ times at least


QUICK = Effort(1, 0.0, "tiny", 128, 32, 2, 4, 2, 8, 2)


@dataclasses.dataclass(frozen=True)
class Case:
    """Something to time.

    Attributes:
      run: does it once and waits until it is done.
      flops: of the networks, in one run.
      extra_flops: of the optimizer.
      yardstick: what it is held against, of `yardsticks`.
    """

    run: Callable[[], Any]
    flops: float
    extra_flops: float = 0.0
    yardstick: str = "products"


# --------------------------------------------------------------------------------------- timing


def seconds_of(run: Callable[[], Any], at_least: float) -> float:
    """Seconds of one run: the mean over as many as take `at_least` together."""
    began = time.perf_counter()
    for count in itertools.count(1):
        run()
        spent = time.perf_counter() - began
        if spent >= at_least:
            return spent / count
    raise AssertionError


def yardsticks(side: int) -> dict[str, Case]:
    """A product of square matrices, the same rounded as `layers.product` does, a convolution of about as much work."""
    a, b = jnp.ones((side, side)), jnp.full((side, side), 0.5)
    channels = max(side // 16, 1)
    batch = max(side**3 // (9 * channels**2 * 32**2), 1)
    x, kernel = jnp.ones((batch, 32, 32, channels)), jnp.ones((3, 3, channels, channels))
    product = jax.jit(jnp.dot)

    @jax.jit
    def rounded(a: jax.Array, b: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("bfloat16"):
            return layers.product(a, b)

    @jax.jit
    def convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    work = flops.count(product, a, b)
    return {
        "products": Case(lambda: product(a, b).block_until_ready(), work),
        "rounded products": Case(lambda: rounded(a, b).block_until_ready(), work),
        "convolutions": Case(lambda: convolution(x, kernel).block_until_ready(), flops.count(convolution, x, kernel)),
    }


def measure(case: Case, yardstick: Case, effort: Effort) -> dict[str, float]:
    """The medians over the rounds; the yardstick is timed before and after each."""
    for warm in (case, yardstick):
        warm.run()
    found: dict[str, list[float]] = {"seconds": [], "gflops": [], "yardstick_gflops": [], "share": []}
    for _ in range(effort.rounds):
        before = seconds_of(yardstick.run, effort.seconds / 2)
        seconds = seconds_of(case.run, effort.seconds)
        after = seconds_of(yardstick.run, effort.seconds / 2)
        rate, own = yardstick.flops / ((before + after) / 2), case.flops / seconds
        for name, value in zip(found, (seconds, own / 1e9, rate / 1e9, own / rate), strict=True):
            found[name].append(value)
    medians = {name: statistics.median(values) for name, values in found.items()}
    if case.extra_flops:
        medians["share_with_optimizer"] = medians["share"] * (1 + case.extra_flops / case.flops)
    return medians | {"share_lowest": min(found["share"]), "share_highest": max(found["share"])}


# ---------------------------------------------------------------------------------- train steps


def stage_spec(name: str, variant: str = "") -> specs.Spec:
    """The spec of configs/scenes/NAME.py; earlier stages by their names."""
    where = quickstart.Setup(quickstart.configs_folder() / "scenes", variant, pathlib.Path(""))
    return specs.from_config(quickstart.stage_config(where, name))


def untrained(path: str, variant: str = "") -> Stage:
    """A tokenizer with arbitrary parameters, for timing what comes after it."""
    spec = stage_spec(path, variant)
    image = jnp.zeros((1, spec.data.image_size, spec.data.image_size, 3))
    params = jax.eval_shape(vqgan.VQGAN(spec.model).init, jax.random.key(0), image)["params"]
    return Stage(spec, arbitrary(sharding.unbox(params)), None, path, 0)


def arbitrary(shapes: Any) -> Any:
    """NumPy arrays of these shapes: noise, or 0 for integers. Nothing is compiled for it."""
    rng = np.random.default_rng(0)

    def one(leaf: Any) -> np.ndarray:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return np.zeros(leaf.shape, leaf.dtype)
        return (0.05 * rng.standard_normal(leaf.shape, np.float32)).astype(leaf.dtype)

    return jax.tree.map(one, shapes)


class Training:
    """A compiled train step and its state, which each call moves on."""

    def __init__(self, spec: specs.Spec, task: Any, batch: Mapping[str, np.ndarray]):
        frozen = task.frozen()
        self.program = step.Program(spec, task, sharding.make_mesh(spec.mesh), frozen)
        self.frozen = sharding.place(sharding.unbox(frozen), step.shardings_of(self.program.frozen))
        self.batch = sharding.put(dict(batch), self.program.batch_sharding)
        self.compiled = self.program.lower_train(self.program.abstract_batch(batch)).compile()
        state = self.program.state
        values = state._replace(
            step=np.zeros((), np.int32),
            params=arbitrary(state.params),
            optimizer=jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state.optimizer),
        )
        self.state = jax.device_put(values, step.shardings_of(state))

    def __call__(self, batch: Any = None) -> None:
        """One step, on the batch in memory unless another is given."""
        self.state, _ = self.compiled(self.state, self.frozen, self.batch if batch is None else batch)

    def wait(self) -> None:
        jax.block_until_ready(self.state)

    def run(self) -> None:
        self()
        self.wait()

    def optimizer_flops(self) -> float:
        state = self.program.state
        return flops.count(self.program.tx.update, state.params, state.optimizer, state.params)


@functools.cache
def stage_training(name: str, effort: Effort) -> tuple[specs.Spec, Training]:
    """The train step of a scenes stage, on a batch of its data."""
    spec = stage_spec(name, effort.variant)
    task = stages.build_task(spec, functools.partial(untrained, variant=effort.variant))
    loader = _loader(spec)
    try:
        return spec, Training(spec, task, next(iter(loader)))
    finally:
        loader.close()


def _loader(spec: specs.Spec) -> Any:
    vocabulary = data.make_vocabulary(spec.data)
    return data.make_loader(spec.data, batch_size=spec.train.batch_size, seed=spec.seed, vocabulary=vocabulary)


def wide_spec(effort: Effort) -> specs.Spec:
    """The masked transformer of train/wide and sample/wide, trained by AdamW on tokens that are given."""
    base = stage_spec("base", effort.variant)
    width = effort.width
    text = dataclasses.replace(base.model.text, layers=1, width=width // 4, heads=4, head_dim=width // 16)
    model = dataclasses.replace(
        base.model,
        codebook_size=1024,
        grid=(effort.grid,) * 2,
        layers=effort.layers,
        width=width,
        heads=max(width // 64, 1),
        mlp_width=4 * width,
        text=text,
        relative_positions=False,
        remat="dots_saveable",  # what is quick to compute again costs more to keep, in the scan over layers
        unroll=1,
    )
    optimizer = specs.OptimizerSpec(name="adamw", learning_rate=1e-4, clip_norm=1.0)
    train = dataclasses.replace(base.train, batch_size=8, matmul_precision="float32")
    task = dataclasses.replace(base.task, codebook_init=False)  # no tokenizer goes with it
    return dataclasses.replace(base, task=task, model=model, optimizer=optimizer, train=train)


def wide_training(spec: specs.Spec, effort: Effort) -> Training:
    """The train step of `wide_spec`; its tokens are given, so that the tokenizer is there but does not run."""
    size, places = spec.train.batch_size, spec.model.grid[0] * spec.model.grid[1]
    rng = np.random.default_rng(0)
    batch = {
        "example_id": np.arange(size, dtype=np.int32),
        "low_tokens": rng.integers(0, spec.model.codebook_size, (size, places), np.int32),
        "text_ids": np.ones((size, spec.data.text_length), np.int32),
        "text_mask": np.ones((size, spec.data.text_length), bool),
    }
    stage = untrained("tokenizer_low", effort.variant)
    return Training(spec, TokensTask(spec, Tokenizer(stage.spec.model, stage.params)), batch)


# ------------------------------------------------------------------------------------- the cases


def train_case(name: str, effort: Effort) -> Case:
    """train/STAGE or train/wide."""
    if name == "wide":
        spec = wide_spec(effort)
        training = wide_training(spec, effort)
        work = 3 * flops.transformer(spec.model, spec.train.batch_size, spec.data.text_length)
    else:
        spec, training = stage_training(name, effort)
        earlier = [spec.task.tokenizer, spec.task.low_tokenizer] if isinstance(spec.task, specs.TokensTaskSpec) else []
        tokenizers = {path: stage_spec(path, effort.variant).model for path in earlier if path}
        work = flops.train(spec, tokenizers)
    products = "rounded products" if spec.train.matmul_precision == "bfloat16" else "products"
    yardstick = "convolutions" if isinstance(spec.model, specs.VQGANSpec) else products
    return Case(training.run, work, training.optimizer_flops(), yardstick)


def sample_case(name: str, effort: Effort) -> Case:
    """sample/wide: parallel decoding of one picture's tokens with guidance."""
    spec = wide_spec(effort)
    model, places, length = spec.model, spec.model.grid[0] * spec.model.grid[1], spec.data.text_length
    network = muse.TokenTransformer(model)
    ids = jnp.ones((2, length), jnp.int32)
    mask = jnp.stack([jnp.ones(length, bool), jnp.zeros(length, bool)])  # with the prompt, and without
    blank = jnp.full((1, places), model.codebook_size, jnp.int32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), blank, ids[:1], mask[:1])
    variables = jax.device_put(arbitrary(sharding.unbox(shapes)))
    plan = sampler.make_plan(tokens=places, num_inference_steps=effort.steps, guidance_scale=3.0)

    def memory(variables: Any) -> Any:
        embeddings = network.apply(variables, ids, mask, method="encode_text")
        return network.apply(variables, embeddings, mask, method="condition")

    def logits(variables: Any, tokens: jax.Array, memory: Any) -> jax.Array:
        return network.apply(variables, tokens, memory, method="logits")

    @jax.jit
    def decode(variables: Any, keys: jax.Array) -> jax.Array:
        seen = memory(variables)
        predict = guidance.guided(lambda tokens: logits(variables, tokens, seen))
        return sampler.decode(predict, blank, plan, keys, model.codebook_size)[0]

    both = jax.ShapeDtypeStruct((2, places), jnp.int32)
    once = flops.count(memory, variables)
    every = flops.count(logits, variables, both, jax.eval_shape(memory, variables))
    keys = jax.random.split(jax.random.key(1), 1)
    return Case(lambda: decode(variables, keys).block_until_ready(), once + effort.steps * every)


def decode_case(name: str, effort: Effort) -> Case:
    """decode/STAGE or decode/wide."""
    if name == "wide":
        multipliers = (1, 2, 2, 4)
        model = specs.VQGANSpec(1024, 8, effort.channels, multipliers, res_blocks=2)
        shape = (1, effort.grid, effort.grid)
    else:
        spec = stage_spec(name, effort.variant)
        model, side = spec.model, spec.data.image_size // spec.model.factor
        shape = (spec.train.batch_size, side, side)
    network = vqgan.VQGAN(model)
    ids = jnp.zeros(shape, jnp.int32)
    image = jnp.zeros((1, model.factor, model.factor, 3))
    variables = jax.device_put(arbitrary(sharding.unbox(jax.eval_shape(network.init, jax.random.key(0), image))))
    decode = functools.partial(network.apply, method="decode_tokens")
    compiled = jax.jit(decode)
    work = flops.count(decode, variables, ids)
    return Case(lambda: compiled(variables, ids).block_until_ready(), work, yardstick="convolutions")


def load_ratio(name: str, effort: Effort) -> dict[str, float]:
    """Time of a train step fed by the loader over its time on a batch in memory, in turns."""
    spec, training = stage_training(name, effort)
    loader = _loader(spec)
    fed = feed.Feed(iter(loader), training.program.batch_sharding, signals.Signals())

    began = time.perf_counter()
    for _ in range(2):
        training.run()
    count = max(effort.loaded, math.ceil(10 * effort.seconds / (time.perf_counter() - began) * 2))

    def spent(batches: Iterable[Any]) -> float:
        # First what was loaded while the other turn ran, so that it isn't taken for fast loading.
        for batch in itertools.islice(batches, spec.data.prefetch + 4):
            training(batch)
        training.wait()
        began = time.perf_counter()
        for batch in itertools.islice(batches, count):
            training(batch)
        training.wait()
        return (time.perf_counter() - began) / count

    def from_loader() -> Iterator[Any]:
        while True:
            yield fed.get()[0]

    try:
        turns = [(spent(from_loader()), spent(itertools.repeat(None))) for _ in range(effort.rounds)]
    finally:
        fed.close()
        loader.close()
    loaded, kept = (statistics.median(times) for times in zip(*turns, strict=True))
    return {"seconds": loaded, "seconds_in_memory": kept, "ratio": statistics.median(a / b for a, b in turns)}


# ------------------------------------------------------------------------------------ the command

KINDS = {"train": train_case, "sample": sample_case, "decode": decode_case}
CASES = (
    *(f"train/{name}" for name in (*STAGES, "wide")),
    "sample/wide",
    *(f"decode/{name}" for name in (*TOKENIZERS, "wide")),
    *(f"load/{name}" for name in STAGES),
)


QUICK_CASES = ("train/tokenizer_high", "train/base", "train/wide", "sample/wide", "decode/wide", "load/base")


def benchmark(names: Sequence[str], effort: Effort, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Times the named cases; what is found is also said, line by line.

    Returns:
      {"machine": {...}, "cases": {name: {"seconds", "share", ...}}}; times in seconds.
    """
    sticks = yardsticks(effort.yardstick)
    device = jax.devices()[0]
    machine = {"device": device.device_kind, "devices": jax.device_count(), "jax": jax.__version__}
    for name, stick in sticks.items():
        stick.run()
        machine[f"{name.replace(' ', '_')}_gflops"] = stick.flops / seconds_of(stick.run, effort.seconds) / 1e9
    say(
        f"{device.device_kind} x {jax.device_count()}, jax {jax.__version__}: float32: products "
        f"{machine['products_gflops']:.0f} GFLOP/s, convolutions {machine['convolutions_gflops']:.0f}; "
        f"rounded to bfloat16: products {machine['rounded_products_gflops']:.0f} GFLOP/s"
    )
    say(f"{'case':22}{'ms':>10}{'GFLOP/s':>10}   share")
    cases: dict[str, dict[str, float]] = {}
    for full in names:
        kind, name = full.split("/")
        if kind == "load":
            cases[full] = found = load_ratio(name, effort)
            say(f"{full:22}{1e3 * found['seconds']:10.1f}{'':10}   {found['ratio']:.2f} times a step in memory")
            continue
        case = KINDS[kind](name, effort)
        cases[full] = found = measure(case, sticks[case.yardstick], effort) | {"flops": case.flops}
        extra = found.get("share_with_optimizer", 0)
        also = f" ({extra:.0%} with the optimizer's)" if extra - found["share"] > 0.005 else ""
        say(
            f"{full:22}{1e3 * found['seconds']:10.1f}{found['gflops']:10.0f}   {found['share']:.0%} of {case.yardstick}"
            f" [{found['share_lowest']:.0%}, {found['share_highest']:.0%}]{also}"
        )
    return {"machine": machine, "cases": cases}


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    known = QUICK_CASES if _QUICK.value and not _ONLY.value else CASES
    names = [case for case in known if not _ONLY.value or any(word in case for word in _ONLY.value)]
    if not names:
        raise app.UsageError(f"--only={','.join(_ONLY.value)} fits none of the cases {', '.join(CASES)}.")
    effort = QUICK if _QUICK.value else Effort(rounds=_ROUNDS.value)
    say = functools.partial(print, file=sys.stderr if _JSON.value else sys.stdout, flush=True)
    found = benchmark(names, effort, say)
    if _JSON.value:
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    _ONLY = flags.DEFINE_list("only", [], "Cases whose name has one of these words, such as train/ or wide.")
    _ROUNDS = flags.DEFINE_integer("rounds", 5, "Timings of each case; medians are shown.", lower_bound=1)
    _QUICK = flags.DEFINE_bool("quick", False, "A few tiny networks, one short round: shows that it runs.")
    _JSON = flags.DEFINE_bool("json", False, "Print JSON, and what else is said to stderr.")
    app.run(main)
