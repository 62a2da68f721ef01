"""Checkpoints that are damaged, can't be written, or belong to something else."""

import errno
import gc
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from etils import epath

from muse_jax import specs
from muse_jax.training import hosts, reading, trees
from muse_jax.training import step as steps
from muse_jax.training.checkpoint import CheckpointError, Checkpoints, StageError, load_stage, save_stage

WANTED = {
    "params": {"a/kernel": ((4, 3), "float32"), "a/bias": ((3,), "float32")},
    "optimizer": {"0/count": ((), "int32"), "0/mu/a/kernel": ((4, 3), "bfloat16")},
}


def items(value: float) -> dict:
    return {
        item: {name: jnp.full(shape, value, dtype) for name, (shape, dtype) in leaves.items()}
        for item, leaves in WANTED.items()
    }


def abstract() -> dict:
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {
        item: {n: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for n, (shape, dtype) in leaves.items()}
        for item, leaves in WANTED.items()
    }


def accept(meta) -> None:
    pass


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with checkpoints of steps 1 (all ones) and 2 (all twos)."""
    workdir = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(workdir, 2, abstract())
    for step in (1, 2):
        checkpoints.save(step, items(step), {"data": "x"})
    checkpoints.close()
    return workdir


def files_of(step: pathlib.Path) -> list[pathlib.Path]:
    return sorted(p for p in step.rglob("*") if p.is_file())


def damages(path: pathlib.Path):
    """Ways to harm one file: bits flipped at several places, cut short, gone."""
    content = path.read_bytes()
    places = sorted({len(content) // 2, len(content) - 1}) if content else []
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << (place % 8)
        yield f"bit of byte {place}", bytes(flipped)
    if content:
        yield "cut short", content[: len(content) // 2]
    yield "gone", None


@pytest.fixture
def _collected():
    yield
    gc.collect()


# Orbax leaves coroutines behind where a read failed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning")
@pytest.mark.usefixtures("_collected")
def test_any_damage_is_seen_or_harmless(saved, tmp_path, monkeypatch):
    """Every file of a checkpoint, harmed in turn: what is restored is step 2 bit for bit, or step 1."""
    monkeypatch.setattr(reading, "PAUSES", (0.0,) * 5)
    fallbacks = 0
    names = [p.relative_to(saved / "checkpoints/2") for p in files_of(saved / "checkpoints/2")]
    assert len(names) > 10
    for name in names:
        for number, (how, content) in enumerate(damages(saved / "checkpoints/2" / name)):
            workdir = tmp_path / f"{str(name).replace('/', '_')}-{number}"
            shutil.copytree(saved, workdir)
            harmed = workdir / "checkpoints/2" / name
            harmed.unlink()
            if content is not None:
                harmed.write_bytes(content)
            checkpoints = Checkpoints(workdir, 2, abstract())
            restored, meta = checkpoints.restore(abstract(), accept)
            checkpoints.close()
            same = trees.named_leaves(items(meta["step"]))
            for leaf, value in trees.named_leaves(restored).items():
                np.testing.assert_array_equal(np.asarray(value), np.asarray(same[leaf]), err_msg=f"{name} {how}")
            assert (workdir / "checkpoints/corrupt-2").exists() == (meta["step"] == 1), f"{name} {how}"
            fallbacks += meta["step"] == 1
            shutil.rmtree(workdir)
    assert fallbacks > len(names)


def failing_reads(monkeypatch, times: int) -> None:
    """The next reads of a checkpoint's meta fail, as on a network disk that is away."""
    kind = type(epath.Path("/"))
    read_text, left = kind.read_text, iter(range(times))

    def read(path, *args, **kwargs):
        if path.name == "metadata" and next(left, None) is not None:
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return read_text(path, *args, **kwargs)

    monkeypatch.setattr(kind, "read_text", read)


def test_a_read_that_fails_for_a_while_sets_nothing_aside(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PAUSES", (0.0,) * 5)
    shutil.copytree(saved, tmp_path / "run")
    failing_reads(monkeypatch, 5)
    checkpoints = Checkpoints(tmp_path / "run", 2, abstract())
    _, meta = checkpoints.restore(abstract(), accept)
    checkpoints.close()
    assert meta["step"] == 2
    assert reading.steps_in(checkpoints.folder) == [1, 2]


def test_storage_that_stays_away_stops_the_run_and_sets_nothing_aside(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PAUSES", (0.0,) * 5)
    shutil.copytree(saved, tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run", 2, abstract())
    with monkeypatch.context() as patch:
        failing_reads(patch, 100)
        message = "2/meta/metadata can't be read.*Stale file handle.*start again when the storage is back"
        with pytest.raises(CheckpointError, match=message):
            checkpoints.restore(abstract(), accept)
    assert checkpoints.restore(abstract(), accept)[1]["step"] == 2
    checkpoints.close()
    assert reading.steps_in(checkpoints.folder) == [1, 2]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning")
@pytest.mark.usefixtures("_collected")
def test_arrays_that_cannot_be_opened_set_nothing_aside(saved, tmp_path, monkeypatch):
    """TensorStore says what the system said in words of its own: a link in a circle stands for a failing disk."""
    monkeypatch.setattr(reading, "PAUSES", (0.0,) * 5)
    shutil.copytree(saved, tmp_path / "run")
    manifest = tmp_path / "run/checkpoints/2/params/manifest.ocdbt"
    content = manifest.read_bytes()
    manifest.unlink()
    manifest.symlink_to(manifest.name)
    checkpoints = Checkpoints(tmp_path / "run", 2, abstract())
    with pytest.raises(CheckpointError, match="2/params can't be read.*start again when the storage is back"):
        checkpoints.restore(abstract(), accept)
    manifest.unlink()
    manifest.write_bytes(content)
    assert checkpoints.restore(abstract(), accept)[1]["step"] == 2
    checkpoints.close()


@pytest.mark.parametrize("lost", [True, False])
def test_processes_agree_on_what_one_of_them_read(saved, tmp_path, monkeypatch, lost):
    """What process 1 alone can't read is set aside by process 0 if it is damaged, and left alone if it is not."""
    shutil.copytree(saved, tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run", 2, abstract())
    answer = {"value": {"damage": "a file is gone"}} if lost else {"error": "CheckpointError: params can't be read"}
    exchanges = iter(range(100))

    def exchange(said):  # the steps, the meta, the parameters
        return [{**said, "host": "a"}, {**(answer if next(exchanges) == 2 else said), "host": "b"}]

    with monkeypatch.context() as patch:
        patch.setattr(hosts, "several", lambda: True)
        patch.setattr(hosts, "_exchange", exchange)
        if lost:
            assert checkpoints.restore(abstract(), accept)[1]["step"] == 1
        else:
            with pytest.raises(CheckpointError, match="process 1 .b.: CheckpointError"):
                checkpoints.restore(abstract(), accept)
    checkpoints.close()
    assert reading.steps_in(checkpoints.folder) == ([1] if lost else [1, 2])


def test_none_left_is_an_error_and_stays_one(saved, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    for step in (1, 2):
        (workdir / "checkpoints" / str(step) / "params/_METADATA").write_text("{}")
    for _ in range(2):  # also once they are set aside
        checkpoints = Checkpoints(workdir, 2, abstract())
        with pytest.raises(CheckpointError, match="no whole checkpoint.*corrupt-1, corrupt-2"):
            checkpoints.restore(abstract(), accept)
        checkpoints.close()
    with pytest.raises(StageError):
        load_stage(workdir)


def test_checkpoints_that_are_gone_are_missed(saved, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    shutil.rmtree(workdir / "checkpoints")
    checkpoints = Checkpoints(workdir, 2, abstract())
    with pytest.raises(CheckpointError, match="no whole checkpoint.*step 2 is gone"):
        checkpoints.restore(abstract(), accept)
    checkpoints.close()


def test_a_folder_is_what_its_name_says(saved, tmp_path):
    """A copy under another step's name is set aside; what is no step's name is left alone."""
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    shutil.copytree(workdir / "checkpoints/1", workdir / "checkpoints/3")
    for name in ("007", "٧"):
        (workdir / "checkpoints" / name).mkdir()
    checkpoints = Checkpoints(workdir, 2, abstract())
    restored, meta = checkpoints.restore(abstract(), accept)
    checkpoints.close()
    assert meta["step"] == 2
    assert {"corrupt-3", "007", "٧"} < set(os.listdir(workdir / "checkpoints"))
    assert reading.steps_in(reading.checkpoints_in(workdir)) == [1, 2]


def test_an_empty_workdir_has_nothing_to_restore(tmp_path):
    assert Checkpoints(tmp_path, 1, abstract()).restore(abstract(), accept) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a/kernel": ((3, 4), "float32")}, r"a/kernel is \(\[4, 3\], 'float32'\), expected \(\[3, 4\]"),
        ({"a/bias": ((3,), "bfloat16")}, "a/bias"),
        ({"a/scale": ((3,), "float32")}, "a/scale is missing"),
    ],
)
def test_other_parameters_are_refused_and_nothing_is_set_aside(saved, tmp_path, change, message):
    shutil.copytree(saved, tmp_path / "run")
    wanted = abstract()
    place = wanted["params"]["a/bias"].sharding
    for name, (shape, dtype) in change.items():
        wanted["params"][name] = jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    checkpoints = Checkpoints(tmp_path / "run", 2, abstract())
    with pytest.raises(CheckpointError, match=message):
        checkpoints.restore(wanted, accept)
    checkpoints.close()
    assert reading.steps_in(checkpoints.folder) == [1, 2]


def test_only_the_newest_are_kept_and_rubbish_is_cleared(tmp_path):
    for rubbish in (".todelete/7", "9.orbax-checkpoint-tmp/params"):
        (tmp_path / "checkpoints" / rubbish).mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path, 2, abstract())
    for step in range(1, 6):
        checkpoints.save(step, items(step), {})
    checkpoints.close()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["4", "5"]


def test_a_save_that_fails_is_counted_and_tried_again(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, 2, abstract())
    checkpoints.save(1, items(1), {})
    assert checkpoints.finish()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 0))
        checkpoints.save(2, items(2), {})
        assert checkpoints.due_again
        checkpoints.save(3, items(3), {})
        with pytest.raises(CheckpointError, match=r"failed 3 times.*intact: \[1\]"):
            checkpoints.save(4, items(4), {})
    checkpoints = Checkpoints(tmp_path, 2, abstract())
    checkpoints.save(5, items(5), {})
    assert checkpoints.finish()
    assert not checkpoints.due_again
    assert reading.steps_in(checkpoints.folder) == [1, 5]
    checkpoints.close()


def test_a_checkpoint_is_saved_though_the_note_of_it_is_not(tmp_path, monkeypatch):
    kind = type(epath.Path("/"))
    write_text = kind.write_text

    def write(path, *args, **kwargs):
        if path.name == ".saved":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_text(path, *args, **kwargs)

    checkpoints = Checkpoints(tmp_path, 2, abstract())
    monkeypatch.setattr(kind, "write_text", write)
    checkpoints.save(1, items(1), {})
    assert checkpoints.finish()
    assert not checkpoints.due_again
    checkpoints.close()
    assert checkpoints.restore(abstract(), accept)[1]["step"] == 1


PEAK = """
import resource, sys
import jax, jax.numpy as jnp
from muse_jax.training.checkpoint import Checkpoints

MIB = 2**20
leaves = {"params": {f"kernel{i}": jax.random.normal(jax.random.key(i), (1024, 1024)) for i in range(50)}}
checkpoints = Checkpoints(sys.argv[1], 1, leaves)
checkpoints.save(1, {"params": {"kernel": jnp.ones((8, 8))}}, {})  # whatever is needed once
checkpoints.finish()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
checkpoints.save(2, leaves, {})
checkpoints.close()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / (200 * MIB))
"""


def test_saving_takes_little_of_the_hosts_memory(tmp_path):
    """Beside the copy of the state that is saved. Orbax by itself would take 0.7 to 0.9 of it again."""
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [p.name for p in tmp_path.glob("checkpoints/[0-9]*")] == ["2"]
    assert float(done.stdout) < 0.3


def test_a_place_that_cannot_be_written_is_an_error_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="--workdir"):
        Checkpoints(tmp_path / "file", 1, abstract())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_fingerprints_agree_and_see_every_bit(dtype):
    rng = np.random.default_rng(0)
    array = np.asarray(jnp.asarray(rng.integers(0, 2, (5, 3, 2)), dtype))
    value = trees.fingerprint_numpy(array)
    assert int(jax.jit(trees.fingerprint)(array)) == value
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    split = jax.device_put(array, jax.NamedSharding(mesh, jax.P(None, None, "data")))
    assert int(jax.jit(trees.fingerprint)(split)) == value
    assert trees.fingerprints({"a": split}) == {"a": value}
    assert trees.fingerprint_numpy(np.ascontiguousarray(array[::-1])) != value
    raw = array.tobytes()
    for byte in range(0, len(raw), 3):
        flipped = bytearray(raw)
        flipped[byte] ^= 1  # the lowest bit, so that a bool stays one
        assert trees.fingerprint_numpy(np.frombuffer(bytes(flipped), array.dtype).reshape(array.shape)) != value


def test_fingerprints_see_a_change_of_all_elements():
    array = np.linspace(-1, 1, 64, dtype=np.float32)
    assert len({trees.fingerprint_numpy(a) for a in (array, array * 2, -array, array + 0 * array, array * 4)}) == 4


def test_stage_folder_round_trip_and_replacement(tmp_path):
    params = {"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}, "b": np.asarray([1, 2], np.int32)}
    for scale in (1, 2):  # the second replaces the first
        tree = jax.tree.map(lambda x, s=scale: x * s, params)
        save_stage(tmp_path / "deep/stage", toys.spec(), tree, {"kind": "words"}, step=scale)
        stage = load_stage(tmp_path / "deep/stage")
        assert stage.spec == toys.spec()
        assert stage.vocabulary == {"kind": "words"}
        assert stage.step == scale
        jax.tree.map(np.testing.assert_array_equal, stage.params, tree)
    assert os.listdir(tmp_path / "deep") == ["stage"]


def test_a_stage_of_a_run_that_would_be_refused_today_can_be_read(tmp_path):
    spec = toys.spec(**{"optimizer.ema_decay": 1.0})
    with pytest.raises(specs.SpecError):
        specs.from_config(specs.to_config(spec))
    save_stage(tmp_path / "stage", spec, {"a": np.ones(3, np.float32)})
    assert load_stage(tmp_path / "stage").spec == spec


def test_a_stage_replaces_nothing_but_a_stage(tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "file").write_text("mine")
    for name, found in (("run", "checkpoints"), ("file", "a file"), (".", "file, run")):
        with pytest.raises(StageError, match=f"more than a stage that could be replaced: {found}"):
            save_stage(tmp_path / name, toys.spec(), {"a": np.ones(3, np.float32)})
    assert sorted(os.listdir(tmp_path)) == ["file", "run"]


def test_a_stage_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    params = {"a": np.ones(3, np.float32)}
    save_stage(tmp_path / "stage", toys.spec(), params)
    monkeypatch.setattr("muse_jax.training.stage.write_json", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_stage(tmp_path / "stage", toys.spec(), {"a": np.zeros(3, np.float32)})
    np.testing.assert_array_equal(load_stage(tmp_path / "stage").params["a"], params["a"])
    assert os.listdir(tmp_path) == ["stage"]


def test_damaged_stage_folders_are_refused(tmp_path):
    save_stage(tmp_path / "stage", toys.spec(), {"a": np.ones(64, np.float32)})
    weights = tmp_path / "stage/params.safetensors"
    content = weights.read_bytes()
    for harmed in (content[:-1] + bytes([content[-1] ^ 1]), content[:-7], b"", content[:4] + b"\xff" + content[5:]):
        weights.write_bytes(harmed)
        with pytest.raises(StageError, match="params.safetensors is damaged"):
            load_stage(tmp_path / "stage")
    weights.unlink()
    with pytest.raises(StageError, match="neither params.safetensors nor checkpoints"):
        load_stage(tmp_path / "stage")
    config = json.loads((tmp_path / "stage/config.json").read_text())
    for wrong, message in (
        ([], "config.json is damaged: it holds a list"),
        ({**config, "task": []}, r"config.json doesn't fit .* task is \[\]; expected a section"),
        ({**config, "rules": 3}, "config.json doesn't fit .* rules is 3; expected a section"),
    ):
        (tmp_path / "stage/config.json").write_text(json.dumps(wrong))
        with pytest.raises(StageError, match=message):
            load_stage(tmp_path / "stage")
    (tmp_path / "stage/config.json").unlink()
    with pytest.raises(StageError, match="config.json is missing"):
        load_stage(tmp_path / "stage")
    with pytest.raises(StageError, match="there is no folder"):
        load_stage(tmp_path / "nowhere")


def test_a_workdir_is_a_stage_and_damage_makes_it_an_older_one(tmp_path):
    run = toys.spec(**{"optimizer.ema_decay": 0.9})
    toys.train(run, tmp_path, vocabulary={"kind": "words"})
    stage = load_stage(tmp_path)
    assert (stage.step, stage.vocabulary, stage.spec) == (8, {"kind": "words"}, run)
    meta = reading.read_meta(epath.Path(tmp_path / "checkpoints/8"))
    prints = {name: trees.fingerprint_numpy(leaf) for name, leaf in trees.named_leaves(stage.params).items()}
    assert prints == {name: leaf[2] for name, leaf in meta["leaves"]["ema"].items()}
    assert prints != {name: leaf[2] for name, leaf in meta["leaves"]["params"].items()}
    text = (tmp_path / "checkpoints/8/meta/metadata").read_text()
    (tmp_path / "checkpoints/8/meta/metadata").write_text(text.replace('"step": 8', '"step": 9'))
    assert load_stage(tmp_path).step == 6
    assert json.loads((tmp_path / "config.json").read_text())["train"]["steps"] == 8


def test_a_workdir_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toys.train(toys.spec(**{"train.steps": 4}), "runs/first")
    assert (tmp_path / "runs/first/checkpoints/4/params").is_dir()
    assert load_stage("runs/first").step == 4
    assert toys.train(toys.spec(), "runs/first").step == 8  # goes on from there


def test_what_is_stored_as_float16_is_computed_in_float32(tmp_path):
    save_stage(tmp_path / "stage", toys.spec(), {"a": np.float16([0.1, 2.0]), "n": np.asarray([3], np.int32)})
    params = load_stage(tmp_path / "stage").params
    assert {name: leaf.dtype for name, leaf in params.items()} == {"a": np.float32, "n": np.int32}
    np.testing.assert_array_equal(params["a"], np.float16([0.1, 2.0]).astype(np.float32))


def test_items_of_a_state_come_back(tmp_path):
    """Names of optimizer leaves are unique and lead back to their places."""
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3,
                         devices=jax.devices()[:1])  # fmt: skip
    program = steps.Program(toys.spec(**{"optimizer.ema_decay": 0.5}), toys.Adversaries(), mesh, {})
    state = program.initial()
    again = steps.from_items(program.state, steps.checkpoint_items(state), 0)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert toys.bits(again) == toys.bits(state)
