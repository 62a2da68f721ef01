"""What a run does: exact steps, exact resuming, refusals, and steps that aren't finite."""

import dataclasses
import gc
import itertools
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

from muse_jax import specs
from muse_jax.training import feed, logs, resume, sharding, signals, trainer, trees
from muse_jax.training import step as steps
from muse_jax.training.checkpoint import CheckpointError, Checkpoints, load_stage


def program_of(run, task=None):
    task = task or toys.Masked()
    mesh = sharding.make_mesh(run.mesh)
    program = steps.Program(run, task, mesh, task.frozen())
    return program, jax.device_put(sharding.unbox(task.frozen()), steps.shardings_of(program.frozen))


def state_of(workdir, run, task=None):
    """The whole state of a workdir's newest checkpoint."""
    program, _ = program_of(run, task)
    wanted = steps.checkpoint_items(program.state)
    checkpoints = Checkpoints(workdir, 9, wanted)
    items, meta = checkpoints.restore(wanted, lambda _: None)
    checkpoints.close()
    return steps.from_items(program.state, items, meta["step"]), meta


def compiled_of(run, task=None):
    """`program_of` with the compiled step."""
    program, frozen = program_of(run, task)
    batch = program.abstract_batch(toys.batch_of(0, run.train.batch_size))
    return program, frozen, program.lower_train(batch).compile()


def run_steps(run, count, task=None, poisoned=()):
    """The states after 0, 1, ... `count` steps, without any of the trainer's loop."""
    program, frozen, compiled = compiled_of(run, task)
    state = program.initial()
    states, metrics = [jax.device_get(state)], []
    for step in range(count):
        batch = sharding.put(toys.batch_of(step, run.train.batch_size, step in poisoned), program.batch_sharding)
        state, values = compiled(state, frozen, batch)
        states.append(jax.device_get(state))
        metrics.append({name: m.total / m.weight for name, m in jax.device_get(values).items()})
    return states, metrics


def test_a_run_is_its_steps(tmp_path):
    """The loop adds nothing to the steps: same bits as steps called by hand; files are where they should be."""
    run = toys.spec(**{"optimizer.ema_decay": 0.9, "train.eval_every": 4, "train.sample_every": 4})
    result = toys.train(run, tmp_path)
    states, metrics = run_steps(run, 8)
    state, meta = state_of(tmp_path, run)
    assert toys.bits(state) == toys.bits(states[-1])
    assert meta["config"] == specs.to_config(run) == json.loads((tmp_path / "config.json").read_text())
    lines = logs.read_metrics(tmp_path)
    np.testing.assert_allclose(
        [line["grad_norm"] for line in lines if "grad_norm" in line],
        [(metrics[i]["grad_norm"] + metrics[i + 1]["grad_norm"]) / 2 for i in range(0, 8, 2)],
        rtol=1e-5,
    )
    assert [line["step"] for line in lines if "eval/loss" in line] == [4, 8]
    assert sorted(os.listdir(tmp_path / "samples")) == ["tokens-0000004.png", "tokens-0000008.png"]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["6", "8"]
    assert sorted(os.listdir(tmp_path / "checkpoints/8")) == [
        "_CHECKPOINT_METADATA", "commit_success.txt", "ema", "meta", "optimizer", "params"
    ]  # fmt: skip
    assert result.metrics["loss"] == pytest.approx(
        sum(line["loss"] for line in lines if line["step"] == 8 and "loss" in line)
    )
    assert "compile_seconds" in lines[0]


def test_the_collector_leaves_alone_what_was_there_before_the_first_step(tmp_path, monkeypatch):
    frozen, step = [], trainer.Run._one_step
    monkeypatch.setattr(trainer.Run, "_one_step", lambda run: frozen.append(gc.get_freeze_count()) or step(run))
    toys.train(toys.spec(), tmp_path)
    assert min(frozen) > 10_000
    assert gc.get_freeze_count() == 0


def test_a_finished_run_is_not_trained_again(tmp_path, capsys):
    run = toys.spec()
    first = toys.train(run, tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()

    def explode(*_):
        raise AssertionError("nothing is to be loaded")

    again = toys.train(run, tmp_path, make_batches=explode, eval_batches=explode)
    assert again == dataclasses.replace(first, was_finished=True)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    other = toys.spec(sample=specs.SampleSpec(guidance_scale=3.0))
    assert toys.train(other, tmp_path, make_batches=explode, eval_batches=explode).was_finished
    assert load_stage(tmp_path).spec == other


def test_a_finished_run_with_other_weights_is_refused_and_keeps_its_config(tmp_path):
    """Paths may change, since what lies there is compared; also when there is nothing left to train."""
    toys.train(toys.spec(), tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    moved = toys.spec(**{"data.path": "elsewhere"})
    with pytest.raises(resume.ResumeError, match="the training data .* changed"):
        toys.train(moved, tmp_path, data="others")
    assert (tmp_path / "config.json").read_bytes() == before
    assert not toys.train(moved, tmp_path).was_finished  # looked through, for the data are the same
    assert toys.train(moved, tmp_path).was_finished


# Orbax leaves coroutines behind where a read failed.
def test_a_run_killed_right_behind_its_last_evaluation_has_one_of_it(tmp_path):
    run = toys.spec()
    toys.train(run, tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert '"finished"' in lines[-1]
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:-1]))
    toys.train(run, tmp_path)
    found = [line for line in logs.read_metrics(tmp_path) if any(name.startswith("eval/") for name in line)]
    assert [line["step"] for line in found] == [run.train.steps]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning")
def test_a_finished_run_that_was_damaged_is_mended(tmp_path):
    run = toys.spec()
    toys.train(run, tmp_path)
    state, _ = state_of(tmp_path, run)
    (merged,) = (tmp_path / "checkpoints/8/params/d").iterdir()  # beside it lies what was merged, which nobody reads
    content = bytearray(merged.read_bytes())
    content[len(content) // 2] ^= 4
    merged.write_bytes(bytes(content))
    assert not toys.train(run, tmp_path).was_finished
    assert "corrupt-8" in os.listdir(tmp_path / "checkpoints")
    assert toys.bits(state_of(tmp_path, run)[0]) == toys.bits(state)
    gc.collect()


def test_a_deadline_of_0_is_none(tmp_path):
    assert toys.train(toys.spec(**{"deadlines.save": 0.0}), tmp_path).step == 8


def test_without_any_checkpoint_no_newest_one_is_named(tmp_path):
    run = toys.spec(**{"train.stop_after_nonfinite": 2})
    with pytest.raises(trainer.NonFiniteError, match="There is no checkpoint yet"):
        toys.train(run, tmp_path, poisoned=range(9))


def test_a_checkpoint_that_failed_is_not_named_as_the_newest(tmp_path, monkeypatch):
    def full(self, _items):
        if self._saving == 6:
            raise OSError("No space left on device")

    monkeypatch.setattr(Checkpoints, "_check_space", full)
    run = toys.spec(**{"train.steps": 20, "train.stop_after_nonfinite": 2})
    with pytest.raises(trainer.NonFiniteError, match="The newest checkpoint is that of step 3"):
        toys.train(run, tmp_path, poisoned=range(6, 20))


@pytest.mark.parametrize("kind", sorted(toys.TASKS))
def test_stopped_and_started_again_gives_the_same_bits(tmp_path, kind):
    """A run in three pieces, of which one ends with an error between checkpoints, equals one in one piece."""
    task = toys.TASKS[kind]()
    run = toys.spec(**{"optimizer.ema_decay": 0.9})
    toys.train(run, tmp_path / "whole", task)

    def broken(start, until):
        for step, batch in enumerate(toys.batches(start), start):
            if step == until:
                raise OSError("the data are gone")
            yield batch

    for until in (4, 7):
        with pytest.raises(OSError, match="the data are gone"):
            toys.train(run, tmp_path / "pieces", task, make_batches=lambda start, u=until: broken(start, u))
    toys.train(run, tmp_path / "pieces", task)
    whole, pieces = (state_of(tmp_path / name, run, task) for name in ("whole", "pieces"))
    assert toys.bits(whole[0]) == toys.bits(pieces[0])
    assert all(meta.pop("trained_seconds") > 0 for _, meta in (whole, pieces))
    assert whole[1] == pieces[1]
    kept = [
        [(line["step"], line.get("loss"), line.get("eval/loss")) for line in logs.read_metrics(tmp_path / name)
         if "loss" in line or "eval/loss" in line]
        for name in ("whole", "pieces")
    ]  # fmt: skip
    assert {step for step, *_ in kept[1]} == {2, 4, 6, 8}
    assert kept[0][-1] == kept[1][-1]


@pytest.mark.parametrize("during", ["evaluate", "samples"])
def test_sigterm_while_evaluating_or_drawing_saves_and_goes_on_to_the_same_bits(tmp_path, during):
    class Interrupted(toys.Masked):
        def evaluate(self, params, frozen, batch, key):
            if during == "evaluate":
                jax.debug.callback(lambda: os.kill(os.getpid(), signal.SIGTERM))
            return super().evaluate(params, frozen, batch, key)

        def samples(self, params, frozen, batch, key):
            if during == "samples":
                jax.debug.callback(lambda: os.kill(os.getpid(), signal.SIGTERM))
            return super().samples(params, frozen, batch, key)

    run = toys.spec(**{"train.eval_every": 4, "train.sample_every": 4})
    with pytest.raises(signals.Stopped, match="SIGTERM at step 4"):
        toys.train(run, tmp_path / "run", Interrupted())
    assert (tmp_path / "run/checkpoints/4").is_dir()
    toys.train(run, tmp_path / "run")
    toys.train(run, tmp_path / "whole")
    run_bits, whole_bits = (toys.bits(load_stage(tmp_path / name).params) for name in ("run", "whole"))
    assert run_bits == whole_bits
    lines, drawn = (
        [[line for line in logs.read_metrics(tmp_path / name) if "eval/loss" in line] for name in ("run", "whole")],
        [sorted(os.listdir(tmp_path / name / "samples")) for name in ("run", "whole")],
    )
    assert lines[0] == lines[1]
    assert drawn[0] == drawn[1]


def test_samples_that_cannot_be_drawn_end_nothing(tmp_path, caplog):
    class Undrawable(toys.Masked):
        def samples(self, params, frozen, batch, key):
            def fail(tokens):
                raise OSError("gone")

            tokens = jax.pure_callback(fail, batch["tokens"], batch["tokens"])
            return super().samples(params, frozen, {**batch, "tokens": tokens}, key)

    assert toys.train(toys.spec(**{"train.sample_every": 4}), tmp_path, Undrawable()).step == 8
    messages = [record.getMessage() for record in caplog.records if record.name == "absl"]
    for step, message in zip((4, 8), messages, strict=True):
        assert message.startswith(f"no samples of step {step}, training goes on without them: JaxRuntimeError: ")
    assert logs.read_metrics(tmp_path)[-1][logs.FINISHED]


def test_samples_that_cannot_be_compiled_end_the_run_before_its_first_step(tmp_path):
    class Wrong(toys.Masked):
        def samples(self, params, *_):
            return params["none"]

    with pytest.raises(KeyError, match="none"):
        toys.train(toys.spec(), tmp_path, Wrong())
    assert not [line for line in logs.read_metrics(tmp_path) if "loss" in line]


def test_sigterm_between_two_lines_loses_no_metrics(tmp_path, monkeypatch):
    """The line of the step that it stopped at is of those since the last one; the next is of the steps after it."""
    changes = {"train.steps": 12, "optimizer.schedule": "constant"}
    toys.train(toys.spec(**changes, **{"train.log_every": 1}), tmp_path / "each")
    run = toys.spec(**changes, **{"train.log_every": 4})
    with monkeypatch.context() as patched:
        stop = {5: lambda: os.kill(os.getpid(), signal.SIGTERM)}
        patched.setattr(logs.Logs, "progress", lambda _, step, **shown: stop.get(step, bool)())
        with pytest.raises(signals.Stopped, match="at step 6"):
            toys.train(run, tmp_path / "run")
    toys.train(run, tmp_path / "run")
    lines, each = (
        {line["step"]: line["masked"] for line in logs.read_metrics(tmp_path / name) if "masked" in line}
        for name in ("run", "each")
    )
    assert list(lines) == [4, 6, 8, 12]
    for since, step in itertools.pairwise([0, *lines]):
        assert lines[step] == pytest.approx(np.mean([each[i] for i in range(since + 1, step + 1)]))


def test_a_step_that_is_not_finite_changes_nothing(tmp_path):
    run = toys.spec(**{"optimizer.ema_decay": 0.9})
    states, metrics = run_steps(run, 5, poisoned=(2,))
    for name in ("params", "optimizer", "ema"):
        assert toys.bits(getattr(states[3], name)) == toys.bits(getattr(states[2], name))
        assert toys.bits(getattr(states[4], name)) != toys.bits(getattr(states[3], name))
    assert states[3].step == 3
    assert [m["nonfinite"] for m in metrics] == [0, 0, 1, 0, 0]
    result = toys.train(run, tmp_path, poisoned=(2, 5))
    assert result.metrics["nonfinite_steps"] == 2
    assert all(np.isfinite(line.get("loss", 0.0)) for line in logs.read_metrics(tmp_path))


def test_several_in_a_row_stop_the_run(tmp_path):
    run = toys.spec(**{"train.stop_after_nonfinite": 3, "train.steps": 20, "checkpoint.every_steps": 2})
    with pytest.raises(trainer.NonFiniteError) as error:
        toys.train(run, tmp_path, poisoned=(4, 6, 7, 8))
    for said in ("up to step 9", "step 7: [24, 25, 26, 27]", "step 9: [32, 33, 34, 35]", "'loss': nan"):
        assert said in str(error.value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(load_stage(tmp_path).params))
    # counted across a restart: two more make three
    with pytest.raises(trainer.NonFiniteError, match="3 steps in a row, up to step 9"):
        toys.train(run, tmp_path, poisoned=(4, 6, 7, 8))


def test_frozen_parameters_keep_their_bits():
    """Even the sign of a zero; and they have no optimizer state."""
    states, _ = run_steps(toys.spec(), 2)
    assert toys.bits(states[2].params["unused"]) == toys.bits(states[0].params["unused"])
    assert np.signbit(states[2].params["unused"]).all()
    owners = [name for name in trees.named_leaves(states[0].optimizer) if name.endswith("unused")]
    assert not owners


def test_accumulating_micro_batches_changes_nothing():
    """Each micro-batch masks another number of tokens, so that a plain mean of gradients would differ."""
    whole, whole_metrics = run_steps(toys.spec(), 3)
    parts, parts_metrics = run_steps(toys.spec(**{"optimizer.accumulate": 4}), 3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), whole[-1].params, parts[-1].params)
    for name in ("loss", "masked", "grad_norm"):
        assert parts_metrics[2][name] == pytest.approx(whole_metrics[2][name], rel=1e-4)


def test_what_micro_batches_leave_for_after_the_update_is_merged():
    whole, _ = run_steps(toys.spec(), 2, toys.Adversaries())
    parts, _ = run_steps(toys.spec(**{"optimizer.accumulate": 4}), 2, toys.Adversaries())
    np.testing.assert_allclose(whole[-1].params["unused"], parts[-1].params["unused"], atol=1e-6)


def test_ema_follows_its_definition():
    states, _ = run_steps(toys.spec(**{"optimizer.ema_decay": 0.3}), 4)
    expected = states[0].params
    for step in range(4):
        decay = min(0.3, (1 + step) / (10 + step))
        expected = jax.tree.map(
            lambda old, new, d=decay: d * old + (1 - d) * new, expected, states[step + 1].params
        )  # fmt: skip
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), expected, states[4].ema)


def test_labels_have_optimizers_of_their_own():
    """The discriminator with learning rate 0 stays; what `after_update` changes is changed."""
    run = toys.spec(**{"optimizer.overrides": {"discriminator": {"learning_rate": 0.0}}})
    states, metrics = run_steps(run, 3, toys.Adversaries())
    assert toys.bits(states[3].params["discriminator"]) == toys.bits(states[0].params["discriminator"])
    assert toys.bits(states[3].params["generator"]) != toys.bits(states[0].params["generator"])
    assert toys.bits(states[3].params["unused"]) != toys.bits(states[0].params["unused"])
    assert metrics[0]["grad_norm"] == pytest.approx(
        np.hypot(metrics[0]["grad_norm/generator"], metrics[0]["grad_norm/discriminator"]), rel=1e-5
    )


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)])
def test_meshes_give_the_same_steps(sizes):
    run = toys.spec(**{"train.batch_size": 8})
    alone, alone_metrics = run_steps(run, 3)
    spread = dataclasses.replace(run, mesh=specs.MeshSpec(*sizes))
    states, metrics = run_steps(spread, 3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), alone[-1], states[-1])
    assert metrics[2]["loss"] == pytest.approx(alone_metrics[2]["loss"], rel=1e-5)


def test_a_checkpoint_restores_on_another_mesh(tmp_path):
    run = toys.spec(**{"train.batch_size": 8, "mesh": specs.MeshSpec(1, 2, 4), "optimizer.name": "adafactor"})
    toys.train(run, tmp_path)
    there, _ = state_of(tmp_path, run)
    for sizes in ((1, 1, 1), (8, 1, 1), (2, 2, 2)):
        here, _ = state_of(tmp_path, dataclasses.replace(run, mesh=specs.MeshSpec(*sizes)))
        assert toys.bits(here) == toys.bits(there)
        assert here.params["layers"]["kernel"].sharding.mesh.devices.size == np.prod(sizes)


def mutations():
    """Every key of a config changed in turn, and whether the run may go on with it."""
    free = ("mesh.", "checkpoint.", "sample.", "data.workers", "data.prefetch", "data.path", "data.eval_split",
            "data.most_broken", "task.init_from",
            "task.perceptual_weights", "train.log_every", "train.eval_every", "train.eval_batches",
            "train.sample_every", "train.stop_after_nonfinite", "train.compare_every", "train.replay_every",
            "train.donate", "train.tpu_options", "rules.", "deadlines.", "frozen_rules", "profile.")  # fmt: skip

    def leaves(tree, path=""):
        for key, value in tree.items():
            if isinstance(value, dict) and value:
                yield from leaves(value, f"{path}{key}.")
            else:
                yield f"{path}{key}", value

    for key, value in leaves(specs.to_config(toys.spec())):
        if key not in ("train.steps", "train.skip_batches"):
            yield key, value, key.startswith(free)


def test_every_key_is_refused_or_free():
    old = specs.to_config(toys.spec())
    seen = {True: 0, False: 0}
    for key, value, free in mutations():
        new = json.loads(json.dumps(old))
        *path, last = key.split(".")
        section = new
        for part in path:
            section = section[part]
        section[last] = (
            not value if isinstance(value, bool) else value + 1 if isinstance(value, int | float) else "other"
        )
        seen[free] += 1
        if free:
            resume.check_config(old, new, step=3)
        else:
            with pytest.raises(resume.ResumeError, match=f"{key.replace('.', '[.]')} was .* and is now"):
                resume.check_config(old, new, step=3)
    assert min(seen.values()) > 15


@pytest.mark.parametrize(
    ("schedule", "new", "allowed"),
    [("cosine", 12, True), ("cosine", 6, False), ("constant", 12, True), ("constant", 6, True), ("constant", 2, False)],
)
def test_the_length_may_grow(schedule, new, allowed):
    old = toys.spec(**{"optimizer.schedule": schedule})
    changed = dataclasses.replace(old, train=dataclasses.replace(old.train, steps=new))
    if allowed:
        resume.check_config(specs.to_config(old), specs.to_config(changed), step=3)
    else:
        with pytest.raises(resume.ResumeError, match=r"train\.steps"):
            resume.check_config(specs.to_config(old), specs.to_config(changed), step=3)


@pytest.mark.parametrize(
    ("schedule", "override", "allowed"),
    [("constant", "cosine", False), ("constant", "constant", True), ("cosine", "constant", False)],
)
def test_the_length_may_shrink_if_every_schedule_is_constant(schedule, override, allowed):
    overrides = {"generator": {"schedule": override}, "discriminator": {"learning_rate": 0.1}}
    old = toys.spec(**{"optimizer.schedule": schedule, "optimizer.overrides": overrides})
    new = dataclasses.replace(old, train=dataclasses.replace(old.train, steps=6))
    if allowed:
        resume.check_config(specs.to_config(old), specs.to_config(new), step=3)
    else:
        with pytest.raises(resume.ResumeError, match=r"train\.steps"):
            resume.check_config(specs.to_config(old), specs.to_config(new), step=3)


@pytest.mark.parametrize(
    ("old", "new", "allowed"),
    [
        ((), ((3, 5),), True),  # steps 1 to 3 saw batches 0 to 2
        ((), ((2, 5),), False),
        (((0, 2),), ((0, 2), (5, 9)), True),  # they saw 2 to 4
        (((0, 2),), ((0, 2), (4, 9)), False),
        (((0, 2),), (), False),
        (((0, 2),), ((0, 3),), False),
        (((7, 8),), (), True),
    ],
)
def test_batches_that_no_step_has_seen_may_be_skipped(old, new, allowed):
    old, new = (specs.to_config(toys.spec(**{"train.skip_batches": batches})) for batches in (old, new))
    if allowed:
        resume.check_config(old, new, step=3)
    else:
        with pytest.raises(resume.ResumeError, match=r"train\.skip_batches was .* and is now"):
            resume.check_config(old, new, step=3)


def test_what_a_source_of_a_mixture_is_evaluated_on_is_free():
    def config(**changes):
        source = {"weight": 1.0, "name": "scenes", **changes}
        return specs.to_config(toys.spec(**{"data.name": "mixture", "data.sources": {"drawn": source}}))

    resume.check_config(config(), config(eval_split="heldout"), step=3)
    resume.check_config(config(eval_split="test"), config(eval_split="heldout"), step=3)
    with pytest.raises(resume.ResumeError, match=r"data\.sources\.drawn\.split"):
        resume.check_config(config(), config(split="heldout"), step=3)


@pytest.mark.parametrize(("schedule", "times"), [("cosine", 1), ("constant", 0)])
def test_that_a_schedule_is_prolonged_is_said_once(tmp_path, caplog, schedule, times):
    toys.train(toys.spec(**{"optimizer.schedule": schedule}), tmp_path)
    toys.train(toys.spec(**{"optimizer.schedule": schedule, "train.steps": 12}), tmp_path)
    said = [message for message in caplog.messages if "train.steps was 8 and is now 12: from step 8 on" in message]
    assert len(said) == times


def test_a_profile_of_steps_that_are_done_is_missed(tmp_path, caplog):
    run = toys.spec(**{"optimizer.schedule": "constant"})
    toys.train(run, tmp_path)
    longer = {"train": dataclasses.replace(run.train, steps=12), "profile": specs.ProfileSpec(2, 2)}
    toys.train(dataclasses.replace(run, **longer), tmp_path)
    assert caplog.messages == [
        "no profile is made: it was asked for from step 2 on, for 2 steps, and the run goes on from step 8; set "
        "profile.start_step behind that."
    ]


def test_a_constant_schedule_may_be_prolonged_exactly(tmp_path):
    short = toys.spec(**{"optimizer.schedule": "constant"})
    long = toys.spec(**{"optimizer.schedule": "constant", "train.steps": 11})
    toys.train(short, tmp_path / "a")
    assert toys.train(long, tmp_path / "a").step == 11
    toys.train(long, tmp_path / "b")
    assert toys.bits(state_of(tmp_path / "a", long)[0]) == toys.bits(state_of(tmp_path / "b", long)[0])


def test_what_would_train_something_else_is_refused_before_anything_is_built(tmp_path):
    toys.train(toys.spec(), tmp_path)
    config = (tmp_path / "config.json").read_text()
    with pytest.raises(resume.ResumeError, match=r"optimizer\.learning_rate was 0\.01 and is now 0\.02"):
        toys.train(toys.spec(**{"optimizer.learning_rate": 0.02}), tmp_path, task=object())
    longer = toys.spec(**{"train.steps": 12})
    with pytest.raises(resume.ResumeError, match="the training data"):
        toys.train(longer, tmp_path, data="other")

    class Retrained(toys.Masked):
        def frozen(self):
            return {"table": super().frozen()["table"] * 2}

    with pytest.raises(resume.ResumeError, match=r"frozen network .*\(table\)"):
        toys.train(longer, tmp_path, task=Retrained())
    assert (tmp_path / "config.json").read_text() == config


def test_misfits_of_devices_and_batch_say_what_to_do(tmp_path):
    run = toys.spec(**{"train.batch_size": 6, "mesh": specs.MeshSpec()})
    with pytest.raises(specs.SpecError, match="train.batch_size to a multiple of 8, such as 8"):
        toys.train(run, tmp_path)
    run = toys.spec(**{"train.batch_size": 16, "optimizer.accumulate": 4, "mesh": specs.MeshSpec()})
    with pytest.raises(specs.SpecError, match="in 4 micro-batches of 4 can't be divided over 8"):
        toys.train(run, tmp_path)
    with pytest.raises(specs.SpecError, match="needs 16 devices, but 8"):
        toys.train(toys.spec(mesh=specs.MeshSpec(data=16)), tmp_path)
    with pytest.raises(specs.SpecError, match=r"rules\.embed"):
        toys.train(toys.spec(rules={k: v for k, v in toys.RULES.items() if k != "embed"}), tmp_path)
    with pytest.raises(feed.DataError, match="3 examples"):
        toys.train(toys.spec(), tmp_path, make_batches=lambda start: toys.batches(start, 3))
    with pytest.raises(feed.DataError, match="ended"):
        toys.train(toys.spec(), tmp_path, make_batches=lambda start: iter([toys.batch_of(0, 4)]))
    assert not (tmp_path / "checkpoints").exists() or os.listdir(tmp_path / "checkpoints") == []


def test_saving_may_fail_for_a_while(tmp_path, monkeypatch):
    """Training goes on, the older checkpoint stays, and the next attempt comes before the next interval."""
    run = toys.spec(**{"train.steps": 20, "checkpoint.every_steps": 6, "train.log_every": 2})
    save, tried = Checkpoints._check_space, []

    def full(self, items):
        tried.append(self._saving)
        if self._saving in (12, 14):
            assert sorted(p.name for p in self.folder.iterdir()) == ["6"]
            raise OSError("no space left on device")
        return save(self, items)

    monkeypatch.setattr(Checkpoints, "_check_space", full)
    assert toys.train(run, tmp_path).step == 20
    assert tried == [6, 12, 14, 16, 18, 20]
    monkeypatch.setattr(Checkpoints, "_check_space", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(CheckpointError, match="failed 3 times"):
        toys.train(toys.spec(), tmp_path / "never")


def test_a_new_step_is_not_compiled_after_resuming(tmp_path):
    """Arrays from a checkpoint have the layout of those made at the start: the compiled step takes both."""
    run = toys.spec()
    toys.train(run, tmp_path)
    program, frozen, compiled = compiled_of(run)
    fresh, (restored, _) = program.initial(), state_of(tmp_path, run)
    layouts = [jax.tree.map(lambda x: (x.sharding, x.dtype, x.format.layout), s) for s in (fresh, restored)]
    assert layouts[0] == layouts[1]
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(restored.params)]
    after, _ = compiled(restored, frozen, sharding.put(toys.batch_of(8, 4), program.batch_sharding))
    reused = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(after.params)]
    assert set(pointers) == set(reused)  # restored memory is donated like any other


def test_the_step_sees_mesh_and_rules():
    """A model's constraints on activations take effect in the lowered program."""
    import flax.linen as nn

    class Constrained(toys.Masked):
        def loss(self, params, frozen, batch, key):
            frozen = {"table": nn.with_logical_constraint(frozen["table"], ("vocab", "embed"))}
            return super().loss(params, frozen, batch, key)

    run = toys.spec(**{"mesh": specs.MeshSpec(1, 2, 1), "train.batch_size": 2})
    counts = []
    for task in (toys.Masked(), Constrained()):
        program, _ = program_of(run, task)
        text = program.lower_train(program.abstract_batch(toys.batch_of(0, 2))).as_text()
        counts.append(text.count("sharding_constraint") + text.count("@Sharding"))
    assert counts[1] > counts[0]


def test_steps_follow_the_optimizer():
    """One step of AdamW by hand, without accumulation, clipping or masks."""
    run = toys.spec(**{"optimizer.clip_norm": 0.0, "optimizer.weight_decay": 0.0, "optimizer.schedule": "constant"})
    states, _ = run_steps(run, 1)
    task = toys.Masked()
    key = jax.random.fold_in(steps.stream_key(run.seed, steps.TRAIN), 0)
    batch = {name: jnp.asarray(leaf) for name, leaf in toys.batch_of(0, 4).items()}
    grads, _, _ = jax.jit(task.grads)(states[0].params, task.frozen(), batch, key, 0)
    tx = optax.adam(0.01, 0.9, 0.99)
    updates, _ = tx.update(grads, tx.init(grads), grads)
    expected = optax.apply_updates(states[0].params, updates)
    for name in ("layers", "head"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), expected[name], states[1].params[name])


def test_without_donation_the_same_bits(tmp_path):
    """Only whether the new state takes the old one's memory differs."""
    programs = {donate: program_of(toys.spec(**{"train.donate": donate}))[0] for donate in (True, False)}
    batch = programs[True].abstract_batch(toys.batch_of(0, 4))
    texts = {donate: program.lower_train(batch).as_text() for donate, program in programs.items()}
    aliased = {donate: "tf.aliasing_output" in text or "jax.buffer_donor" in text for donate, text in texts.items()}
    assert aliased == {True: True, False: False}
    states = [run_steps(toys.spec(**{"train.donate": donate}), 2)[0][-1] for donate in (True, False)]
    assert toys.bits(states[0]) == toys.bits(states[1])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_in_bfloat16(accumulate):
    """They are rounded to 8 bits, and nothing else is."""
    run = toys.spec(**{"optimizer.accumulate": accumulate})
    exact, rounded = (
        run_steps(dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, gradient_dtype=dtype)), 1)
        for dtype in ("float32", "bfloat16")
    )
    norms = [metrics[0]["grad_norm"] for _, metrics in (exact, rounded)]
    assert norms[0] != norms[1]
    assert norms[1] == pytest.approx(norms[0], rel=2**-7)
    assert exact[1][0]["loss"] == rounded[1][0]["loss"]
    dtypes = [[leaf.dtype for leaf in jax.tree.leaves(states[-1])] for states, _ in (exact, rounded)]
    assert dtypes[0] == dtypes[1]
