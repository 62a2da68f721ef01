"""The loop that trains any task.

Order of a step, on which exact resuming rests: the device starts step n; meanwhile the host reads and
writes the metrics of step n - 1; then, where it is time, metrics are logged, a checkpoint is saved, the
held-out batches are evaluated and samples drawn. Nothing after the step itself changes the state.
"""

import contextlib
import dataclasses
import gc
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from muse_jax import specs
from muse_jax.training import executable, hosts, locks, reading, replicas, resume, sharding, signals, trees
from muse_jax.training import feed as feeds
from muse_jax.training import logs as logging
from muse_jax.training import meter as meters
from muse_jax.training import profile as profiles
from muse_jax.training import step as steps
from muse_jax.training.checkpoint import Checkpoints
from muse_jax.training.stage import CONFIG, VOCABULARY, write_json
from muse_jax.training.watchdog import Watchdog

Batches = Iterable[Mapping[str, np.ndarray]]
_SLOW = 0.5  # share of the time that a process waits for data, from which on it is named


class NonFiniteError(RuntimeError):
    """Several steps in a row had a loss or gradient that isn't finite."""


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended: its last step and the metrics of that step, "loss" and "eval/..." among them."""

    step: int
    metrics: dict[str, float]
    was_finished: bool = False  # nothing had to be done


def train(
    spec: specs.Spec,
    task: Any,
    *,
    workdir: Any,
    make_batches: Callable[[int], Iterator[Mapping[str, np.ndarray]]],
    eval_batches: Callable[[], Batches],
    data_fingerprint: str,
    vocabulary: Mapping[str, Any] | None = None,
    model_flops: float = 0.0,
    peak_flops: float = 0.0,
    tensorboard: bool = True,
    bar: bool = True,
    loop: Callable[..., "Run"] | None = None,
) -> Result:
    """Trains a task from the newest checkpoint in the workdir, or from the start, to the last step.

    Args:
      spec: the run.
      task: a `tasks.task.Task`.
      workdir: holds all that the run writes. One run at a time.
      make_batches: called with the first step; yields the batches of it and of all steps after it.
      eval_batches: called once; returns the held-out batches, the same every time.
      data_fingerprint: of the training data; a run goes on with the data it was started with only.
      vocabulary: written to vocabulary.json, for models that read text.
      model_flops: of the networks in a step; 0 where not known.
      peak_flops: of a device, a second; 0 where not known. With both, the utilisation is logged.
      tensorboard: whether to write TensorBoard files beside metrics.jsonl.
      bar: whether to show a progress bar.
      loop: another `Run`, with some of its methods replaced.

    Raises:
      specs.SpecError: the config doesn't fit the devices.
      executable.DeviceMemoryError: their memory has no room for it.
      resume.ResumeError: another run holds the workdir, or this one would train something else.
      reading.CheckpointError: no whole checkpoint is left, or none can be written.
      NonFiniteError: after `train.stop_after_nonfinite` such steps in a row.
      signals.Stopped: after SIGTERM or Ctrl-C; everything is saved.
      replicas.ReplicaError: devices that should hold the same bits don't.
      hosts.HostError: another process of the run failed or is gone.
    """
    with Watchdog(spec.deadlines) as watch, contextlib.ExitStack() as stack, hosts.telling(watch.described):
        finished = already_finished(spec, workdir)
        if finished:
            return finished
        hosts.check_same("the config", trees.named_leaves(specs.to_config(spec)))
        hosts.from_leader("locking the workdir", lambda: stack.enter_context(locks.held(workdir)))
        stop = stack.enter_context(signals.listening())
        run = (loop or Run)(spec, task, workdir, data_fingerprint, vocabulary, stop, watch)
        run.meter.work = dataclasses.replace(run.meter.work, flops=model_flops, peak_flops=peak_flops)
        run.start(make_batches, eval_batches, tensorboard, bar, stack)
        return run.to_the_end()


def already_finished(spec: specs.Spec, workdir: Any) -> Result | None:
    """The result of a run that needs nothing more, told without building anything; None if it isn't one.

    One whose newest checkpoint is damaged, or whose config names other paths, is none: it goes the way of every
    run, on which checkpoints are set aside and what it reads is compared with what it was trained on.

    Raises:
      resume.ResumeError: if the workdir's run trained something else than `spec`.
    """
    found = hosts.from_leader("looking into the workdir", lambda: _finished(spec, workdir))
    return None if found is None else Result(**found, was_finished=True)


def _finished(spec: specs.Spec, workdir: Any) -> dict[str, Any] | None:
    folder = reading.checkpoints_in(workdir)
    try:
        newest = folder / str(reading.steps_in(folder)[-1])
        meta = reading.read_meta(newest)
        described = json.loads((epath.Path(workdir) / CONFIG).read_text())
    except (IndexError, OSError, ValueError, reading.Damaged):
        return None
    config = specs.to_config(spec)
    resume.check_config(specs.completed(meta["config"]), config, meta["step"])
    lines = logging.read_metrics(workdir)
    if meta["step"] < spec.train.steps or not lines or not lines[-1].get(logging.FINISHED):
        return None
    if resume.paths_changed(specs.completed(described), config) or not _whole(newest, meta):
        return None
    if described.get("sample") != config["sample"]:  # what else is free has nothing to say once the run is over
        with locks.held(workdir):
            write_json(epath.Path(workdir) / CONFIG, {**described, "sample": config["sample"]})
    return {"step": meta["step"], "metrics": _latest(lines)}


def _whole(checkpoint: epath.Path, meta: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is what was saved; of a pod's, which no host may have room for, whether it is all there."""
    try:
        for item, stored in meta["leaves"].items():
            read = reading.check_structure if hosts.several() else reading.read_numpy
            read(checkpoint, item, stored)
    except (OSError, ValueError, KeyError, reading.Damaged):
        return False
    return True


def _latest(lines: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The newest value of each metric."""
    merged: dict[str, Any] = {}
    for line in lines:
        merged |= line
    return {k: v for k, v in merged.items() if k not in ("step", logging.FINISHED)}


class Run:
    """The parts of one run, put together by `start` and run by `to_the_end`."""

    def __init__(
        self,
        spec: specs.Spec,
        task: Any,
        workdir: Any,
        data: str,
        vocabulary: Any,
        stop: signals.Signals,
        watch: Watchdog,
    ) -> None:
        self.spec, self.task, self.stop, self.watch = spec, task, stop, watch
        self.workdir = epath.Path(os.fspath(workdir))
        self.vocabulary = vocabulary
        self.mesh = sharding.make_mesh(spec.mesh)
        frozen = task.frozen()
        self.program = steps.Program(spec, task, self.mesh, frozen)
        self._check_room()
        self.frozen = sharding.place(sharding.unbox(frozen), steps.shardings_of(self.program.frozen))
        self.identity = {"config": specs.to_config(spec), "data": data, "frozen": trees.fingerprints(self.frozen)}
        hosts.check_same("what is trained on", {"data": data, **self.identity["frozen"]})
        self.state: steps.State
        self.compiled_as: dict[str, Any] | None = None  # the identity of the step that led to the state
        self.trained: float | None = None  # seconds in the steps before this process
        self.step = 0  # steps done, of which the metrics of the last may not have been read yet
        self.saved = -1  # the newest step that a checkpoint was started for
        self.nonfinite = self.in_a_row = 0
        self.pending: tuple[int, Any, np.ndarray] | None = None
        self.bad_ids: list[list[int]] = []
        self.latest: dict[str, float] = {}
        self.slow = ""  # the process that was named last
        self.sums = _Sums()
        self.meter = meters.Meter(meters.Work(spec.train.batch_size, self.mesh.size))
        self.profile = profiles.Profile(spec.profile, self.workdir)

    # ------------------------------------------------------------------------------------ start

    def start(
        self, make_batches: Any, eval_batches: Any, tensorboard: bool, bar: bool, stack: contextlib.ExitStack
    ) -> None:
        """Everything up to the first step."""
        self.watch.enter("restore", self.step)
        folder = reading.checkpoints_in(self.workdir)
        self.stop.begin(hosts.from_leader("looking for checkpoints", lambda: max(reading.steps_in(folder), default=0)))
        expected = steps.checkpoint_items(self.program.state)
        self.checkpoints = Checkpoints(self.workdir, self.spec.checkpoint.keep, expected, self.spec.deadlines.save / 2)
        stack.enter_context(_closing(self.checkpoints))
        self._restore_or_init()
        replicas.check_bytes(steps.checkpoint_items(self.state), expected, self.mesh, self.spec.mesh.most_bytes)
        self.watch.enter("start", self.step)
        hosts.from_leader("writing the config", self._describe)
        self.meter.begin(meters.begin(self.workdir, self.step, hosts.leads(), self.trained), self.step)
        self.profile.begin(self.step)
        self.logs = logging.Silent()
        if hosts.leads():
            self.logs = logging.Logs(self.workdir, self.step, self.spec.train.steps, tensorboard, bar)
        stack.callback(self.logs.close)
        self.latest = _latest(logging.read_metrics(self.workdir))
        if self.step:
            self.logs.say(f"goes on from step {self.step} of {self.spec.train.steps} in {self.workdir}")
        if not self.stop.came:
            self._compile(make_batches, eval_batches, stack)

    def _describe(self) -> None:
        write_json(self.workdir / CONFIG, self.identity["config"])
        if self.vocabulary is not None:
            write_json(self.workdir / VOCABULARY, self.vocabulary)

    def _check_room(self) -> None:
        names = {"params": "parameters", "optimizer": "optimizer", "ema": "EMA"}
        parts = {said: executable.device_bytes(getattr(self.program.state, name)) for name, said in names.items()}
        parts["frozen networks"] = executable.device_bytes(self.program.frozen)
        remedy = "Split it over more devices (mesh.fsdp, mesh.tensor), or take a smaller model."
        executable.check_room("the state", parts, self.mesh, remedy)

    def _restore_or_init(self) -> None:
        # Outside of the mesh's context, under which Orbax's work on single devices would break.
        abstract = self.program.state
        restored = self.checkpoints.restore(steps.checkpoint_items(abstract), self._check_meta)
        if restored is None:
            self.state = self.program.initial()
            return
        items, meta = restored
        if hosts.leads():
            resume.warn_if_longer(specs.completed(meta["config"]), self.identity["config"], meta["step"])
        self.step = self.saved = meta["step"]
        self.nonfinite, self.in_a_row = meta["nonfinite"], meta["in_a_row"]
        self.compiled_as, self.trained = meta.get("compiled"), meta.get("trained_seconds")  # older ones don't say
        self.state = steps.from_items(abstract, items, self.step)

    def _check_meta(self, meta: Mapping[str, Any]) -> None:
        resume.check_config(specs.completed(meta["config"]), self.identity["config"], meta["step"])
        hints = {
            "data": "the training data (data.path and its files)",
            "frozen": "the parameters of a frozen network (task.tokenizer, text encoder or other weights)",
        }
        for key, what in hints.items():
            resume.check_fingerprints(what, meta[key], self.identity[key], "bring back what it was started with")

    def _compile(self, make_batches: Any, eval_batches: Any, stack: contextlib.ExitStack) -> None:
        """Compiles all programs ahead: no later call compiles anything, and what can't run is known at once."""
        self.watch.enter("data", self.step)
        self.held_out = [dict(batch) for batch in eval_batches()]
        if self.step < self.spec.train.steps:
            self.feed = feeds.Feed(make_batches(self.step), self.program.batch_sharding, self.stop)
            stack.callback(self.feed.close)
            with self._during("data"):
                self.first = self.feed.get()
            if self.first is None:
                return
            batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.first[0])
            self._check_batch(batch)
        began = time.monotonic()
        with self._during("compile"):
            if self.step < self.spec.train.steps:
                self._compile_step(batch)
            if self.held_out:
                self._compile_evaluation_and_samples()
        seconds = time.monotonic() - began
        self.logs.say(f"compiled in {seconds:.1f} s")
        self._log({"compile_seconds": seconds})

    def _compile_step(self, batch: Any) -> None:
        kept = executable.device_bytes(self.program.state) if self.spec.train.replay_every else 0
        lowered = self.program.lower_train(batch)
        self.train_step = executable.fitting(
            "the train step", lambda: self.program.compile_train(lowered), kept, self.mesh
        )
        before, self.compiled_as = self.compiled_as, executable.identity(lowered, self.program.options, self.mesh)
        changed = executable.difference(before or {}, self.compiled_as)
        if changed and hosts.leads():
            absl.logging.warning(
                "from step %d on, steps are compiled otherwise than before (%s): the run goes on, but not bit for bit "
                "as without the change", self.step, changed
            )  # fmt: skip

    def _compile_evaluation_and_samples(self) -> None:
        program, batch = self.program, self.program.abstract_batch(self.held_out[0])
        others = executable.device_bytes(program.state) - executable.device_bytes(program.state.best)

        def fitting(what: str, lower: Callable[[Any], Any]) -> Any:
            return executable.fitting(what, lambda: lower(batch).compile(), others, self.mesh)

        self.evaluate = fitting("the evaluation", program.lower_evaluate)
        self.draw = fitting("the drawing of samples", program.lower_samples)

    def _check_batch(self, batch: Mapping[str, Any]) -> None:
        size = self.spec.train.batch_size
        for name, leaf in batch.items():
            if leaf.shape[0] != size:
                raise feeds.DataError(f"the batch has {leaf.shape[0]} examples of {name}; train.batch_size is {size}.")

    # ------------------------------------------------------------------------------------- loop

    def to_the_end(self) -> Result:
        """Runs the remaining steps, then saves, evaluates and draws a last time."""
        with contextlib.closing(self.profile), _without_long_collections(), self.meter.during(meters.STEP):
            return self._to_the_end()

    def _to_the_end(self) -> Result:
        total, every = self.spec.train, self.spec.checkpoint.every_steps
        if 0 < self.step < total.steps:
            self._catch_up()
        while self.step < total.steps:
            self._one_step()
            last = self.step == total.steps
            again = self.checkpoints.due_again and self.due(total.log_every, self.step)
            if self.due(every, self.step) or last or again:
                self._save()
            if self.due(total.compare_every, self.step) and self.saved != self.step:
                self._compare()
            if self.due(total.eval_every, self.step) and not last:
                self._evaluate()
            if self.due(total.sample_every, self.step) and not last:
                self._samples()
        self._stop_if_asked()
        self._save_surely()
        self._evaluate()
        self._samples()
        self._stop_if_asked()
        self._log({logging.FINISHED: True})
        return Result(self.step, self.latest)

    def due(self, every: int, step: int) -> bool:
        """Whether it is time, after this step, for what is done every so many steps; 0: never."""
        return every > 0 and step % every == 0

    def _catch_up(self) -> None:
        """Evaluates, and draws, if the run was stopped before it did so at the step that it goes on from."""

        def done() -> tuple[bool, bool]:
            lines = (line for line in logging.read_metrics(self.workdir) if line["step"] == self.step)
            return any(map(logging.is_evaluation, lines)), logging.were_drawn(self.workdir, self.step)

        evaluated, drawn = hosts.from_leader("looking for what was left out", done)
        every = self.spec.train
        if self.due(every.eval_every, self.step) and not evaluated:
            self._evaluate()
        if self.due(every.sample_every, self.step) and not drawn:
            self._samples()

    def _one_step(self) -> None:
        self._stop_if_asked()
        with self.meter.during("evaluate"):  # no training either
            self.profile.before(self.step, self.state)
        with self._during("data"):
            batch = self.first or self.feed.get()
        self.first = None
        if batch is None:
            self._stop_if_asked()
        arrays, ids = batch
        kept = steps.copied(self.state) if self.due(self.spec.train.replay_every, self.step + 1) else None
        self.state, metrics = self.train_step(self.state, self.frozen, arrays)
        if kept is not None:
            self._replay(kept, arrays)
        before, self.pending = self.pending, (self.step + 1, metrics, ids)
        self._read(before)
        self.step += 1
        self.checkpoints.poll()
        if self.step == self.spec.train.steps:
            self._drain()

    def _drain(self) -> None:
        """Reads the metrics of the step that the device may still be working on."""
        before, self.pending = self.pending, None
        self._read(before)

    def _read(self, pending: tuple[int, Any, np.ndarray] | None) -> None:
        """Waits for a step's metrics, counts what isn't finite, and logs where it is time."""
        if pending is None:
            return
        step, metrics, ids = pending
        values = {name: (float(m.total), float(m.weight)) for name, m in jax.device_get(metrics).items()}
        if values["nonfinite"][0]:
            self._count_nonfinite(step, values, ids)
        else:
            self.in_a_row, self.bad_ids = 0, []
            self.sums.add(values)
        if self.due(self.spec.train.log_every, step) or step == self.spec.train.steps:
            self._log_line(step)
        else:
            self.logs.progress(step)

    def _log_line(self, step: int) -> None:
        """The means over the steps since the line before, and where the time went."""
        rates = self.meter.line(step)
        if hosts.several():
            slowest, which = self.watch.slowest_wait()
            rates["time/data_slowest"] = max(rates["time/data"], slowest)
            if slowest > _SLOW and which != self.slow:
                self.slow = which
                absl.logging.warning(
                    "%s waits for data %.0f%% of the time, and the others for it", which, 100 * slowest
                )
        line = self.sums.means() | {"nonfinite_steps": self.nonfinite} | rates
        self._log(line, step)
        shown = {"loss": f"{line.get('loss', float('nan')):.4g}", "steps/s": f"{rates['steps_per_second']:.3g}"}
        self.logs.progress(step, **shown)
        self.sums = _Sums()

    def _count_nonfinite(self, step: int, values: Mapping[str, tuple[float, float]], ids: np.ndarray) -> None:
        self.nonfinite += 1
        self.in_a_row += 1
        self.bad_ids.append(ids.tolist())
        if self.in_a_row < self.spec.train.stop_after_nonfinite:
            return
        shown = {name: total / weight if weight else None for name, (total, weight) in sorted(values.items())}
        listed = "; ".join(f"step {step - len(self.bad_ids) + 1 + i}: {ids}" for i, ids in enumerate(self.bad_ids))
        raise NonFiniteError(
            f"{self.in_a_row} steps in a row, up to step {step}, had a loss or gradient that isn't finite; none of "
            f"them changed anything. {self._newest()}. Metrics of step {step}: "
            f"{shown}. Example ids: {listed}."
        )

    def _newest(self) -> str:
        """Which checkpoint there is to go back to, in words; one that is being saved may still fail."""
        with contextlib.suppress(reading.CheckpointError), self._during("save"):
            self.checkpoints.finish()
        kept = reading.steps_in(self.checkpoints.folder)
        return f"The newest checkpoint is that of step {kept[-1]}" if kept else "There is no checkpoint yet"

    def _log(self, values: Mapping[str, Any], step: int | None = None) -> None:
        self.logs.scalars(self.step if step is None else step, values)
        self.latest |= {k: float(v) for k, v in values.items() if k != logging.FINISHED}

    @contextlib.contextmanager
    def _during(self, phase: str) -> Iterator[None]:
        """A phase, with its deadline and its share of the time; after it come steps again."""
        self.watch.enter(phase, self.step)
        with self.meter.during(meters.PHASES.get(phase, phase)):
            yield
        self.watch.enter("step", self.step)

    # ------------------------------------------------------------------------ between the steps

    def _stop_if_asked(self) -> None:
        if self.stop.at(self.step):
            self._drain()
            if self.sums.sums:  # the run that goes on counts from here
                self._log_line(self.step)
            self._save_surely()
            self.logs.say("")
            raise signals.Stopped(self.stop.number, self.step)

    def _save(self) -> None:
        """Starts a checkpoint of the state as it is now."""
        self._drain()
        with self._during("save"):
            state = self.state
            if self.mesh.devices.flat[0].platform == "cpu":
                # Orbax reads in the background. Elsewhere it has its own copy on the host by the time
                # it returns; here it would read the buffers that the next step is donated.
                state = steps.copied(state)
            more = {"nonfinite": self.nonfinite, "in_a_row": self.in_a_row, "compiled": self.compiled_as}
            more |= {"trained_seconds": self.meter.trained}
            self.checkpoints.save(self.step, steps.checkpoint_items(state), {**self.identity, **more})
            self.saved = self.step

    def _save_surely(self) -> None:
        """Ends with the state of this step on disk, or with an error after several attempts."""
        self._drain()
        if self.saved != self.step:
            self._save()
        with self._during("save"):
            while not self.checkpoints.finish():
                time.sleep(1)
                self._save()

    def _compare(self) -> None:
        """Compares the replicas; a checkpoint does that too."""
        if self.mesh.size > 1:
            self._drain()
            with self._during("save"):
                for leaves in steps.checkpoint_items(self.state).values():
                    replicas.fingerprints(leaves)

    def _replay(self, before: steps.State, arrays: Any) -> None:
        """Makes the step from `before` once more, which finds what a chip computed wrongly without a copy of it."""
        with self._during("save"):
            again, _ = self.train_step(before, self.frozen, arrays)
            made = steps.checkpoint_items(self.state)
            for item, leaves in steps.checkpoint_items(again).items():
                replicas.check_same(leaves, made[item], self.step + 1)

    def _evaluate(self) -> None:
        """Metrics on the held-out batches, with the EMA if there is one."""
        self._drain()
        with self._during("evaluate"):
            sums: dict[str, np.ndarray] = {}
            for index, batch in enumerate(self.held_out):
                if self.stop.came:
                    return
                arrays = sharding.put(batch, self.program.batch_sharding)
                metrics = jax.device_get(self.evaluate(self.state.best, self.frozen, arrays, jnp.int32(index)))
                for name, metric in metrics.items():
                    sums[name] = sums.get(name, 0) + np.asarray([metric.total, metric.weight], np.float64)
            values = {f"eval/{name}": float(total / weight) for name, (total, weight) in sums.items() if weight}
            if values:
                self._log(values)

    def _samples(self) -> None:
        """Pictures for fixed prompts, those of the first held-out batch; a run goes on without them."""
        if not self.held_out or self.stop.came:
            return
        self._drain()
        with self._during("samples"):
            try:
                self._draw()
            except Exception as error:
                if hosts.several():  # the others have drawn theirs, or wait for this one in the midst of it
                    raise
                what = reading.brief(error)
                absl.logging.warning("no samples of step %d, training goes on without them: %s", self.step, what)

    def _draw(self) -> None:
        batch = sharding.put(self.held_out[0], self.program.batch_sharding)
        pictures = jax.device_get(self.draw(self.state.best, self.frozen, batch))
        if pictures:
            self.logs.images(self.step, pictures)


class _Sums:
    """Metrics since the last line that was logged."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, float]] = {}

    def add(self, values: Mapping[str, tuple[float, float]]) -> None:
        """Adds the metrics of a step."""
        for name, (total, weight) in values.items():
            before = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = (before[0] + total, before[1] + weight)

    def means(self) -> dict[str, float]:
        """Their means; without what was never counted."""
        return {n: total / weight for n, (total, weight) in self.sums.items() if weight and n != "nonfinite"}


@contextlib.contextmanager
def _without_long_collections() -> Iterator[None]:
    """Python's collector leaves alone what is there by now.

    To look through all that jax made while it compiled takes a third of a second, which saving a checkpoint would
    bring about, and on a pod in each process at another time, while the others wait.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def _closing(checkpoints: Checkpoints) -> Iterator[None]:
    """Closes, without hiding an error that is on its way."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, signals.Stopped) or not hosts.several():  # else the others don't close theirs
            with contextlib.suppress(Exception):
                checkpoints.close()
        raise
    checkpoints.close()
