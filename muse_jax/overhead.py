"""What checkpoints and metrics cost a train loop: python -m muse_jax.overhead [--steps=240] [--rounds=3].

Trains the base model of configs/scenes/base.py (--variant, the longer preset by default) for some steps, in
turns with a checkpoint every 50 steps and metrics every 10, and with neither, and compares the seconds from
the first step to the last line of metrics. What else the machine does goes into both.
"""

from muse_jax import process

if __name__ == "__main__":
    process.reexec_with_malloc_settings()  # before jax is imported

import dataclasses
import functools
import pathlib
import statistics
import tempfile
from collections.abc import Sequence
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


def measure(variant: str, steps: int, rounds: int) -> dict[str, float]:
    """Seconds of both, and the median over the rounds of the share that checkpoints and metrics cost."""
    spec = benchmark.stage_spec("base", variant)
    task = stages.build_task(spec, functools.partial(benchmark.untrained, variant=variant))
    kinds = {"seconds": (LOGGED_EVERY, SAVED_EVERY), "seconds_with_neither": (steps, steps)}
    times = []
    for turn in range(rounds):
        order = list(kinds)[:: -1 if turn % 2 else 1]  # what the machine does slower and slower goes into both
        times.append({kind: seconds_of(spec, task, steps, *kinds[kind]) for kind in order})
    share = statistics.median(each["seconds"] / each["seconds_with_neither"] - 1 for each in times)
    return {**{kind: statistics.median(each[kind] for each in times) for kind in kinds}, "share": share}


def main(argv: Sequence[str]) -> None:
    process.quiet()
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    found = measure(_VARIANT.value, _STEPS.value, _ROUNDS.value)
    print(
        f"{_STEPS.value} steps take {found['seconds']:.1f} s with a checkpoint every {SAVED_EVERY} and metrics every "
        f"{LOGGED_EVERY} steps, {found['seconds_with_neither']:.1f} s with neither: {found['share']:+.1%}"
    )


if __name__ == "__main__":
    _VARIANT = flags.DEFINE_string("variant", "long", "Of the scenes' config.")
    _STEPS = flags.DEFINE_integer("steps", 240, "Of a run.", lower_bound=1)
    _ROUNDS = flags.DEFINE_integer("rounds", 3, "Of the two runs in turn; the median counts.", lower_bound=1)
    app.run(main)
