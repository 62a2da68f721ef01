"""What checkpoints and metrics cost a train loop: python -m muse_jax.overhead [--steps=240] [--rounds=3].

Trains the base model of configs/scenes/base.py (--variant, the longer preset by default) for some steps, in
turns with a checkpoint every 50 steps and metrics every 10, and with neither, and compares the seconds from
the first step to the last line of metrics. What else the machine does only makes a run slower, so that the fastest
of each kind count; how far the rounds differ by themselves is printed too.
"""

from muse_jax import process

if __name__ == "__main__":
    process.reexec_with_malloc_settings()  # before jax is imported

import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags

from muse_jax import benchmark, data, specs, stages
from muse_jax.training import logs, trainer

SAVED_EVERY, LOGGED_EVERY = 50, 10


def seconds_of(spec: specs.Spec, task: Any, steps: int, logged: int, saved: int) -> float:
    """Of a run's steps and of all that they waited for, compiling left out."""
    train = dataclasses.replace(spec.train, steps=steps, log_every=logged, eval_batches=0)
    spec = dataclasses.replace(spec, train=train, checkpoint=specs.CheckpointSpec(every_steps=saved))
    vocabulary = data.make_vocabulary(spec.data)

    def batches(start: int) -> data.Loader:
        size = spec.train.batch_size
        return data.make_loader(spec.data, batch_size=size, seed=spec.seed, vocabulary=vocabulary, start_step=start)

    with tempfile.TemporaryDirectory() as workdir:
        arguments = {"make_batches": batches, "eval_batches": list, "data_fingerprint": "", "bar": False}
        trainer.train(spec, task, workdir=pathlib.Path(workdir), **arguments)
        return spent(logs.read_metrics(workdir))


def spent(lines: Sequence[dict[str, Any]]) -> float:
    """Seconds of the lines, without starting and compiling."""
    total, before = 0.0, 0.0
    for line in (line for line in lines if "trained_seconds" in line):
        whole = (line["trained_seconds"] - before) / line["time/step"]
        total += whole * (1 - line["time/start"] - line["time/compile"])
        before = line["trained_seconds"]
    return total


def measure(variant: str, steps: int, rounds: int) -> list[dict[str, float]]:
    """Seconds of both, for each round: "with" checkpoints and metrics, and "without"."""
    spec = benchmark.stage_spec("base", variant)
    task = stages.build_task(spec, functools.partial(benchmark.untrained, variant=variant))
    kinds = {"with": (LOGGED_EVERY, SAVED_EVERY), "without": (steps, steps)}
    times = []
    for turn in range(rounds):
        order = list(kinds)[:: -1 if turn % 2 else 1]  # what the machine does slower and slower goes into both
        times.append({kind: seconds_of(spec, task, steps, *kinds[kind]) for kind in order})
    return times


def cost(times: Sequence[Mapping[str, float]]) -> str:
    """What the seconds of `measure` say.

    >>> print(cost([{"with": 10.3, "without": 10.0}, {"with": 10.2, "without": 11.0}]))
    10.2 s with, 10.0 s without: +2.0% (in each round: +3.0%, -7.3%)
    """
    kept, plain = (min(each[kind] for each in times) for kind in ("with", "without"))
    rounds = ", ".join(f"{each['with'] / each['without'] - 1:+.1%}" for each in times)
    return f"{kept:.1f} s with, {plain:.1f} s without: {kept / plain - 1:+.1%} (in each round: {rounds})"


def main(argv: Sequence[str]) -> None:
    process.quiet()
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    found = cost(measure(_VARIANT.value, _STEPS.value, _ROUNDS.value))
    print(f"{_STEPS.value} steps, a checkpoint every {SAVED_EVERY} and metrics every {LOGGED_EVERY}: {found}")


if __name__ == "__main__":
    _VARIANT = flags.DEFINE_string("variant", "long", "Of the scenes' config.")
    _STEPS = flags.DEFINE_integer("steps", 240, "Of a run.", lower_bound=1)
    _ROUNDS = flags.DEFINE_integer("rounds", 3, "Of the two runs in turn; the fastest count.", lower_bound=1)
    app.run(main)
