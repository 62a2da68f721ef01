"""Trains one stage: python -m muse_jax.train --config=configs/scenes/base.py --workdir=DIR [--config.any.key=value].

The workdir holds all that the run writes. Started again, it goes on from the newest whole checkpoint
and ends with the same bits as if it had never stopped; a finished run says so and ends.

On a TPU slice the same command runs on every host, and they find each other. Elsewhere every process of
a run gets --coordinator=HOST:PORT --num_processes=N --process_id=I. The workdir is one that all share.

Exit codes: 0 finished; 1 an error, said in one message where it is the config's, the data's or another
process's; 124 stuck for longer than the config's `deadlines` allow; 143 stopped by SIGTERM and 130 by
Ctrl-C, with everything saved (143 for both with several processes, all of which stop at the same step).
A signal is heeded at the next step; a compilation, a picture being drawn or a checkpoint being written
is finished first.
"""

from muse_jax import process

if __name__ == "__main__":
    process.reexec_with_malloc_settings()  # before jax is imported

import contextlib
import itertools
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import jax
from absl import app, flags
from ml_collections import config_flags

from muse_jax import ahead, data, flops, precomputed, roofline, specs
from muse_jax.data import transforms
from muse_jax.training import (
    checkpoint,
    executable,
    feed,
    hosts,
    reading,
    replicas,
    resume,
    sharding,
    signals,
    trainer,
    watchdog,
)

# What a person can mend; said without a traceback.
MENDABLE = (
    specs.SpecError,
    resume.ResumeError,
    reading.CheckpointError,
    checkpoint.StageError,
    feed.DataError,
    transforms.UnusableError,
    trainer.NonFiniteError,
    replicas.ReplicaError,
    executable.DeviceMemoryError,
    hosts.HostError,
)


def train(spec: specs.Spec, workdir: Any, *, tensorboard: bool = True, bar: bool = True) -> trainer.Result:
    """Trains what the spec says, in the workdir; goes on where a run there stopped.

    Args:
      spec: from `specs.from_config`.
      workdir: see `training.trainer.train`, as for what else is raised.
      tensorboard: whether to write TensorBoard files beside metrics.jsonl.
      bar: whether to show a progress bar.

    Returns:
      The last step and its metrics; `was_finished` if there was nothing left to do.

    Raises:
      feed.DataError: if the data can't be used; says why and what to do.
    """
    with watchdog.Watchdog(spec.deadlines, final=False) as watch, hosts.telling(watch.described):
        watch.enter("restore", 0)
        finished = trainer.already_finished(spec, workdir)
        if finished:
            return finished
        watch.enter("start", 0)
        prepared = _prepare(spec)
    return trainer.train(spec, workdir=workdir, tensorboard=tensorboard, bar=bar, **prepared)


def _prepare(spec: specs.Spec) -> dict[str, Any]:
    """What else `trainer.train` takes: the task, its data and what is known of them."""
    from muse_jax import stages

    mesh = sharding.make_mesh(spec.mesh)
    sharding.check_batch(spec, mesh)
    check_attention(spec, mesh.devices.flat[0].platform)
    part, parts = sharding.process_part(sharding.batch_sharding(mesh, spec.rules), spec.train.batch_size)
    with opening_data():
        vocabulary = data.make_vocabulary(spec.data)
    check_vocabulary(spec, vocabulary)
    task = stages.build_task(spec, checkpoint.load_stage)
    with opening_data():
        source = data.make_source(spec.data, "train")
        held_out = data.make_source(spec.data, "eval") if spec.train.eval_batches else None
    if specs.is_precomputed(spec.data):
        precomputed.check(spec, task, source, vocabulary)

    @opening_data()
    def loader(split: str, start: int) -> data.Loader:
        return data.make_loader(
            spec.data,
            batch_size=spec.train.batch_size,
            seed=spec.seed,
            vocabulary=vocabulary,
            split=split,
            start_step=start,
            process_index=part,
            process_count=parts,
            skip_batches=spec.train.skip_batches if split == "train" else (),
            source=source if split == "train" else held_out,
        )

    @opening_data()
    def eval_batches() -> list[Any]:
        if held_out is None:
            return []
        batches = loader("eval", 0)
        try:
            return list(itertools.islice(batches, spec.train.eval_batches))
        finally:
            batches.close()

    return {
        "task": task,
        "make_batches": lambda start: loader("train", start),
        "eval_batches": eval_batches,
        "data_fingerprint": source.fingerprint(),
        "vocabulary": None if vocabulary is None else vocabulary.to_json(),
        "model_flops": model_flops(spec, task),
        "peak_flops": roofline.peak_flops(jax.local_devices()[0]),
    }


@contextlib.contextmanager
def opening_data() -> Iterator[None]:
    """What is wrong with the data, raised as a `feed.DataError`: what opens them can't know that one.

    What is wrong with the config stays a SpecError.
    """
    try:
        yield
    except specs.SpecError:
        raise
    except (ValueError, OSError) as error:
        raise feed.DataError(str(error)) from error


def model_flops(spec: specs.Spec, task: Any) -> float:
    """Of the networks in a step, for the utilisation in the log; 0 for a model that muse_jax.flops doesn't know."""
    tokenizers = {getattr(spec.task, name): found.spec for name, found in getattr(task, "tokenizers", {}).items()}
    try:
        return flops.train(spec, tokenizers)
    except NotImplementedError:
        return 0.0


def check_attention(spec: specs.Spec, platform: str) -> None:
    """Raises SpecError if the devices don't have the attention that the config asks for."""
    if getattr(spec.model, "attention", "") == "cudnn" and platform not in ("gpu", "cuda"):
        raise specs.SpecError(f"model.attention is 'cudnn', but the devices are {platform}; set it to 'xla'.")


def check_vocabulary(spec: specs.Spec, vocabulary: Any) -> None:
    """Raises SpecError if the data's text ids or classes don't fit the model."""
    classes = getattr(spec.model, "classes", None)
    if classes is not None and vocabulary.size != classes + 1:
        raise specs.SpecError(
            f"model.classes is {classes}, but the data have {vocabulary.size - 1} classes; "
            f"set model.classes={vocabulary.size - 1}."
        )
    text = getattr(spec.model, "text", None)
    if text is not None and vocabulary is not None and vocabulary.size > text.vocabulary_size:
        raise specs.SpecError(
            f"model.text.vocabulary_size is {text.vocabulary_size}, but the vocabulary of the data has "
            f"{vocabulary.size} entries; set it to at least {vocabulary.size}."
        )


def main(argv: Sequence[str]) -> None:
    process.quiet()
    process.end_with_parent()
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    try:
        spec = specs.from_config(_CONFIG.value)
        join(spec.deadlines)
        result = train(spec, _WORKDIR.value)
    except signals.Stopped as stopped:
        print(f"{stopped}: {_WORKDIR.value}", file=sys.stderr)
        sys.exit(stopped.exit_code)
    except Exception as error:
        fail(error, MENDABLE)
    if not hosts.leads():
        return
    state = "was finished already, nothing to do" if result.was_finished else "finished"
    shown = {name: round(result.metrics[name], 4) for name in ("loss", "eval/loss") if name in result.metrics}
    print(f"{_WORKDIR.value} {state}: step {result.step}, {shown}")


def fail(error: Exception, mendable: tuple[type[Exception], ...]) -> NoReturn:
    """Ends this process, alone or of several, with the error being handled; a traceback comes if it isn't mendable."""
    if not isinstance(error, mendable):
        if not hosts.several():
            raise error
        traceback.print_exc()
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    hosts.leave(1)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's, for `app.run`; a --config or variant that is none, or an unknown --config.KEY, is said in one line."""
    try:
        for config in _configs(argv):
            ahead.read_config(config)
        return app.parse_flags_with_usage(argv)
    except specs.SpecError as error:
        print(f"--config: {error}", file=sys.stderr)
        sys.exit(1)
    except (AttributeError, KeyError) as error:
        try:
            config_flags.get_override_values(flags.FLAGS["config"])
        except flags.Error:
            raise error from None  # the config's own file raised it
        missing = error.args[0] if isinstance(error.args[0], KeyError) else error
        key, _, hint = str(missing.args[0]).partition("\n")
        given = [word for word in argv if key.strip("'") in re.split(r"[.=]", word)]
        print(f"{' '.join(given)}: the config has no key {key}. {hint}".rstrip(), file=sys.stderr)
        sys.exit(1)


def _configs(argv: Sequence[str]) -> Iterator[str]:
    """What --config=FILE or --config FILE name, with variants."""
    for word, following in itertools.pairwise([*argv, ""]):
        if word.startswith("-"):
            name, equals, value = word.lstrip("-").partition("=")
            if name == "config":
                yield value if equals else following


def define_process_flags() -> None:
    """The flags that say which of several processes a command's process is; `join` reads them."""
    flags.DEFINE_string("coordinator", None, "host:port of process 0; not needed on TPU slices.")
    flags.DEFINE_integer("num_processes", None, "Processes of this run; not needed on TPU slices.")
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0; not needed on TPU slices.")


def join(deadlines: specs.DeadlinesSpec) -> None:
    """Joins the run's other processes, if there are any; before anything asks jax for devices.

    Raises:
      app.UsageError: for flags that don't go together.
      hosts.HostError: if the others can't be joined.
    """
    given = flags.FLAGS
    try:
        hosts.start(
            given.coordinator,
            given.num_processes,
            given.process_id,
            join_seconds=deadlines.start,
            heartbeat_seconds=deadlines.heartbeat,
        )
    except ValueError as error:
        raise app.UsageError(str(error)) from error


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder that holds all that the run writes.")
    define_process_flags()
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)
