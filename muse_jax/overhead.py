"""What checkpoints and metrics cost a train loop: python -m muse_jax.overhead [--rounds=30].

Trains the base model of configs/scenes/base.py (--variant, the longer preset by default) in one run, of which
every other 50 steps have a checkpoint and metrics every 10, and those between have neither. Each 50 with are
compared with the mean of the 50 before and the 50 after them, since whole runs on one machine differ by more than
what is sought, and it gets slower and faster with time. Printed is the mean of all rounds and its standard error.
"""

from muse_jax import process

if __name__ == "__main__":
    process.reexec_with_malloc_settings()  # before jax is imported

import dataclasses
import functools
import math
import pathlib
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import app, flags

from muse_jax import benchmark, data, specs, stages
from muse_jax.training import trainer

TURN, LOGGED_EVERY = 50, 10  # steps


class InTurns(trainer.Run):
    """Saves and logs in every other `TURN` steps only: from step 0 on, from 2 TURN on, ..."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.ends: list[float] = []  # of the turns, in seconds

    def due(self, every: int, step: int) -> bool:
        """Nothing is, in a turn without."""
        return step // TURN % 2 == 0 and super().due(every, step)

    def _one_step(self) -> None:
        super()._one_step()
        if self.step % TURN == 0:
            self.checkpoints.finish()  # what is still being written belongs to the turn that ends here
            self.ends.append(time.monotonic())


def measure(variant: str, rounds: int) -> list[float]:
    """Seconds of the turns, those without and those with in turn; first and last are turns without."""
    spec = benchmark.stage_spec("base", variant)
    # Three turns warm up, with the first checkpoint; the last step, where all is waited for, belongs to no turn.
    steps = TURN * (3 + 2 * rounds + 1) + 1
    train = dataclasses.replace(spec.train, steps=steps, log_every=LOGGED_EVERY, eval_batches=0)
    spec = dataclasses.replace(spec, train=train, checkpoint=specs.CheckpointSpec(every_steps=TURN))
    task = stages.build_task(spec, functools.partial(benchmark.untrained, variant=variant))
    vocabulary = data.make_vocabulary(spec.data)
    runs = []

    def loop(*args: Any) -> InTurns:
        runs.append(InTurns(*args))
        return runs[0]

    def batches(start: int) -> data.Loader:
        size = spec.train.batch_size
        return data.make_loader(spec.data, batch_size=size, seed=spec.seed, vocabulary=vocabulary, start_step=start)

    with tempfile.TemporaryDirectory() as workdir:
        arguments = {"make_batches": batches, "eval_batches": list, "data_fingerprint": ""}
        trainer.train(spec, task, workdir=pathlib.Path(workdir), **arguments, loop=loop)
    return np.diff(runs[0].ends[2:]).tolist()


def cost(seconds: Sequence[float]) -> str:
    """What the seconds of `measure` say.

    >>> print(cost([10.0, 10.3, 10.2, 10.2, 10.2, 10.3, 10.0]))
    10.1 s without; with, it takes +1.3% (standard error 0.7%, 3 rounds from +0.0% to +2.0%)
    """
    without = np.array(seconds[::2])
    rounds = 100 * (np.array(seconds[1::2]) / (without[:-1] + without[1:]) * 2 - 1)
    error = rounds.std(ddof=1) / math.sqrt(len(rounds)) if len(rounds) > 1 else math.nan
    spread = f"standard error {error:.1f}%, {len(rounds)} rounds from {rounds.min():+.1f}% to {rounds.max():+.1f}%"
    return f"{without.mean():.1f} s without; with, it takes {rounds.mean():+.1f}% ({spread})"


def main(argv: Sequence[str]) -> None:
    process.quiet()
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    found = cost(measure(_VARIANT.value, _ROUNDS.value))
    print(f"{TURN} steps, a checkpoint at the first and metrics every {LOGGED_EVERY}: {found}")


if __name__ == "__main__":
    _VARIANT = flags.DEFINE_string("variant", "long", "Of the scenes' config.")
    _ROUNDS = flags.DEFINE_integer("rounds", 30, "Of 50 steps with and 50 without.", lower_bound=1)
    app.run(main)
