"""The paper's offline EMA: averages the checkpoints that a run kept into a stage folder.

  python -m muse_jax.average --workdir=DIR [--out=FOLDER --decay=0.7]

Muse trains without an EMA, keeps a checkpoint every 5,000 steps and takes as its final weights the
EMA over them, oldest first, with decay 0.7: average <- 0.7 average + 0.3 checkpoint. Set
`checkpoint.keep` so that enough are kept: with decay d, all but d**n of the weight is on the newest n.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import app, flags, logging

from muse_jax import process, sample
from muse_jax.training import reading, stage, trees


def average(workdir: Any, decay: float = 0.7) -> tuple[dict[str, np.ndarray], list[int]]:
    """EMA of the parameters over a run's whole checkpoints, oldest first; it starts as the oldest.

    Args:
      workdir: of the run; damaged checkpoints are passed over.
      decay: in [0, 1); 0 gives the newest checkpoint.

    Returns:
      {parameter's name: array} and the steps that went in. Accumulated in float64.

    Raises:
      stage.StageError: if there is no whole checkpoint.
      ValueError: for a decay out of range.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"--decay is {decay}; expected at least 0 and less than 1.")
    folder = reading.checkpoints_in(workdir)
    total: dict[str, np.ndarray] = {}
    dtypes: dict[str, Any] = {}
    used = []
    for step in reading.steps_in(folder):
        try:
            meta = reading.read_meta(folder / str(step))
            params = reading.read_numpy(folder / str(step), "params", meta["leaves"]["params"])
        except reading.Damaged as error:
            logging.warning("the checkpoint %s is damaged (%s) and left out", folder / str(step), error)
            continue
        dtypes = {name: leaf.dtype for name, leaf in params.items()}
        for name, leaf in params.items():
            wide = leaf.astype(np.float64)
            # What is the same in all checkpoints stays the same bit for bit.
            old = total.get(name, wide)
            total[name] = np.where(old == wide, old, old + (1 - decay) * (wide - old))
        used.append(step)
    if not used:
        raise stage.StageError(f"{folder} holds no whole checkpoint to average.")
    return {name: leaf.astype(dtypes[name]) for name, leaf in total.items()}, used


def main(argv: Sequence[str]) -> None:
    process.quiet()
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    out = _OUT.value or os.path.join(_WORKDIR.value, "averaged")
    try:
        sample.check_above(out, "--out")
        stage.check_replaceable(out)
        params, used = average(_WORKDIR.value, _DECAY.value)
        spec, vocabulary = stage.read_description(_WORKDIR.value)
        stage.save_stage(out, spec, trees.nest(params), vocabulary, used[-1])
    except (reading.CheckpointError, ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
    print(f"averaged the checkpoints of steps {', '.join(map(str, used))} into {out}")


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "The run whose checkpoints are averaged.")
    _OUT = flags.DEFINE_string("out", None, "Stage folder to write; by default WORKDIR/averaged.")
    _DECAY = flags.DEFINE_float("decay", 0.7, "Share of the average that stays at each checkpoint.")
    flags.mark_flag_as_required("workdir")
    app.run(main)
