"""Whether a run may go on in a workdir: what a config may change.

Keys of a config are of four kinds:

  identity: what is trained, on what, how. A change is refused.
  length: `train.steps`. More steps are allowed; the schedule then stretches from here on, so the
    result isn't that of a run that was started with as many (unless all schedules are constant), and a
    warning says so. Fewer are refused, as the learning rates so far were those of the longer run;
    with constant schedules alone they are allowed, down to the steps done.
  skipped batches: `train.skip_batches` may change where no step has come yet, so that a run goes on from before
    a leap of its loss without the data that brought it.
  free: where things lie, how often something is logged, evaluated, saved or drawn, the mesh and what
    else changes where numbers are computed but not which. Paths of data, tokenizers and weights are
    free because their contents are compared instead: fingerprints of the data and of every frozen
    parameter are in the checkpoint.
"""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from muse_jax.specs import batch_of

FREE = (
    "mesh",
    "rules",
    "frozen_rules",
    "checkpoint",
    "sample",
    "deadlines",
    "profile",
    "data.workers",
    "data.prefetch",
    "data.eval_split",
    "data.sources.*.eval_split",
    "data.most_broken",
    "data.sources.*.most_broken",
    "model.remat",
    "model.unroll",
    "model.attention",
    "train.log_every",
    "train.eval_every",
    "train.eval_batches",
    "train.sample_every",
    "train.stop_after_nonfinite",
    "train.compare_every",
    "train.replay_every",
    "train.donate",
    "train.tpu_options",
)
PATHS = (  # free, since what lies there is compared
    "data.path",
    "data.sources.*.path",
    "task.tokenizer",
    "task.low_tokenizer",
    "task.init_from",
    "task.perceptual_weights",
    "model.text.weights",
)
LENGTH = "train.steps"
SKIPPED = "train.skip_batches"


class ResumeError(ValueError):
    """This run would train something else than the one in the workdir, or that one still runs."""


def check_config(old: Mapping[str, Any], new: Mapping[str, Any], step: int) -> None:
    """Raises ResumeError, naming the keys, if `new` would not go on with what `old` has trained for `step` steps."""
    changes = {key: change for key, change in _changes(old, new).items() if not _among(key, (*FREE, *PATHS))}
    length = changes.pop(LENGTH, None)
    if SKIPPED in changes and _same_batches(*changes[SKIPPED], step):
        del changes[SKIPPED]
    if changes:
        lines = "; ".join(f"{key} was {before!r} and is now {after!r}" for key, (before, after) in changes.items())
        raise ResumeError(
            f"the run in this workdir, at step {step}, trains something else: {lines}. "
            "Change it back to go on, or choose another --workdir."
        )
    if length is None:
        return
    before, after = length
    if after < step or (after < before and not _constant(new)):
        raise ResumeError(
            f"{LENGTH} was {before} and is now {after}, but {step} steps are done with the learning rates of {before}. "
            f"Change it back to go on, or choose another --workdir."
        )


def warn_if_longer(old: Mapping[str, Any], new: Mapping[str, Any], step: int) -> None:
    """Says that the rest of a run, whose configs have been checked, follows another schedule than its beginning."""
    before, after = (config["train"]["steps"] for config in (old, new))
    if before != after and not _constant(new):
        logging.warning(
            "train.steps was %d and is now %d: from step %d on the learning rate follows the longer schedule. "
            "The result is not that of a run with %d steps from the start.", before, after, step, after
        )  # fmt: skip


def _constant(config: Mapping[str, Any]) -> bool:
    """Whether the learning rates are the same at every step, whatever the number of steps."""
    schedules = [config["optimizer"], *config["optimizer"]["overrides"].values()]
    return all(section.get("schedule", "constant") == "constant" for section in schedules)


def _same_batches(old: Any, new: Any, step: int) -> bool:
    """Whether the steps so far saw the same batches with either list of skipped ones."""
    if step == 0:
        return True

    def before_the_last(skipped: Any) -> list[tuple[int, int]]:
        last = batch_of(step - 1, skipped or ())
        return [(first, after) for first, after in sorted(skipped or ()) if first <= last]

    return before_the_last(old) == before_the_last(new)


def check_fingerprints(what: str, old: Any, new: Any, hint: str) -> None:
    """Raises ResumeError if what the run reads isn't what it read so far."""
    if old == new:
        return
    names = ""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        changed = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
        names = f" ({changed[0]}{f' and {len(changed) - 1} more' if len(changed) > 1 else ''})"
    raise ResumeError(f"{what}{names} changed since this run was started; {hint}, or choose another --workdir.")


def paths_changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether the configs name other places for what a run reads, which may hold something else."""
    return any(_among(key, PATHS) for key in _changes(old, new))


def _among(key: str, keys: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(key, one) or key.startswith(f"{one}.") for one in keys)


def _changes(old: Any, new: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """{key: (old, new)} of the leaves that differ. A key that one of them lacks is None there."""
    both = [{} if tree is None else tree for tree in (old, new)]
    if (old, new) != (None, None) and all(isinstance(tree, Mapping) for tree in both):
        old, new = both
        found: dict[str, tuple[Any, Any]] = {}
        for key in [*old, *(k for k in new if k not in old)]:
            found |= _changes(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        return found
    return {} if old == new else {path: (old, new)}
