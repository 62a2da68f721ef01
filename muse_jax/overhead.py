"""What checkpoints and metrics cost a train loop: python -m muse_jax.overhead [--rounds=20].

Trains the base model of configs/scenes/base.py (--variant, the longer preset by default) in one run, of which
every other 50 steps have a checkpoint and metrics every 10, and those between have neither. What else a machine
does makes steps slower for seconds on end, by more than what is sought: hence, of the first of the 50 steps, the
median of all rounds counts, of the second likewise, and so on, and the sum of the 50 with is compared with
that of the 50 without. How far the rounds as a whole differ is printed too.
"""

from muse_jax import process

if __name__ == "__main__":
    process.reexec_with_malloc_settings()  # before jax is imported

import dataclasses
import functools
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
        self.ends: list[float] = []  # of the steps, in seconds

    def due(self, every: int, step: int) -> bool:
        """Nothing is, in a turn without."""
        return step // TURN % 2 == 0 and super().due(every, step)

    def _one_step(self) -> None:
        super()._one_step()
        if self.step % TURN == 0:
            self.checkpoints.finish()  # what is still being written belongs to the turn that ends here
        self.ends.append(time.monotonic())


def measure(variant: str, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of the steps with, and of those without, each (rounds, TURN)."""
    spec = benchmark.stage_spec("base", variant)
    steps = 2 * TURN * (rounds + 1) + 1  # the first two turns warm up; the last step, where all is waited for, is none
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
    turns = np.diff(runs[0].ends[2 * TURN - 1 : -1]).reshape(rounds, 2, TURN)
    return turns[:, 0], turns[:, 1]


def cost(kept: np.ndarray, without: np.ndarray) -> str:
    """What the seconds of `measure` say.

    >>> print(cost(np.array([[0.3, 0.2], [0.3, 0.1], [0.9, 0.2]]), np.array([[0.2, 0.2], [0.2, 0.2], [0.2, 0.8]])))
    0.50 s with, 0.40 s without: +25.0% (rounds as a whole: median +10.0%, from +0.0% to +25.0%)
    """
    typical, plain = (np.median(seconds, axis=0).sum() for seconds in (kept, without))
    rounds = kept.sum(axis=1) / without.sum(axis=1) - 1
    spread = f"median {np.median(rounds):+.1%}, from {rounds.min():+.1%} to {rounds.max():+.1%}"
    return f"{typical:.2f} s with, {plain:.2f} s without: {typical / plain - 1:+.1%} (rounds as a whole: {spread})"


def main(argv: Sequence[str]) -> None:
    process.quiet()
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    found = cost(*measure(_VARIANT.value, _ROUNDS.value))
    print(f"{TURN} steps, a checkpoint at the first and metrics every {LOGGED_EVERY}: {found}")


if __name__ == "__main__":
    _VARIANT = flags.DEFINE_string("variant", "long", "Of the scenes' config.")
    _ROUNDS = flags.DEFINE_integer("rounds", 20, "Of 50 steps with and 50 without.", lower_bound=1)
    app.run(main)
