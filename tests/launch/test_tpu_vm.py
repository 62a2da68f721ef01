"""The shell scripts of launch/tpu_vm, against a stand-in gcloud that runs what ssh would run."""

import re
import shutil
import subprocess
import time

import pytest
from stand_in_cloud import SCRIPTS, Cloud

COMMANDS = ["create.sh", "install.sh", "start.sh", "stop.sh", "logs.sh", "delete.sh", "watch.sh"]
WHERE = ["--project=my-project", "--zone=us-central2-b"]
EVERYWHERE = ["--node=all", "--worker=all"]
TPUS = ["compute", "tpus", "queued-resources"]


@pytest.fixture
def cloud(tmp_path):
    made = Cloud(tmp_path)
    yield made
    made.end()


def test_create_asks_for_the_slice_of_the_settings(cloud):
    assert cloud.run("create.sh").returncode == 0
    assert cloud.calls() == [
        [*TPUS, "create", "muse", "--node-id=muse", "--accelerator-type=v4-16"]
        + ["--runtime-version=tpu-ubuntu2204-base", "--spot", *WHERE]
    ]


@pytest.mark.parametrize(
    ("accelerator", "runtime"),
    [("v5litepod-16", "v2-alpha-tpuv5-lite"), ("v5p-8", "v2-alpha-tpuv5"), ("v6e-256", "v2-alpha-tpuv6e")],
)
def test_each_accelerator_has_its_runtime(cloud, accelerator, runtime):
    cloud.set(ACCELERATOR_TYPE=accelerator)
    assert cloud.run("create.sh").returncode == 0
    assert f"--runtime-version={runtime}" in cloud.calls("create")[0]


def test_create_several_slices_of_a_reservation(cloud):
    cloud.set(SLICES="3", CAPACITY="reserved", RUNTIME_VERSION="mine", CREATE_ARGS="(--network=ours '--labels=a=b c')")
    assert cloud.run("create.sh").returncode == 0
    words = cloud.calls("create")[0]
    assert {"--node-count=3", "--node-prefix=muse", "--reserved", "--runtime-version=mine"} <= set(words)
    assert {"--network=ours", "--labels=a=b c"} <= set(words)
    assert not {"--node-id=muse", "--spot"} & set(words)


def test_on_demand_has_no_flag(cloud):
    cloud.set(CAPACITY="on-demand")
    assert cloud.run("create.sh").returncode == 0
    assert not {"--spot", "--reserved", "--on-demand"} & set(cloud.calls("create")[0])


def test_create_waits_until_the_slice_is_ready(cloud):
    cloud.write("states", "WAITING_FOR_RESOURCES\nBROKEN\nPROVISIONING")
    done = cloud.run("create.sh", "--wait")
    assert done.returncode == 0, done.stderr
    states = re.findall(r"muse: (\w+)", done.stdout)
    assert states == ["WAITING_FOR_RESOURCES", "UNKNOWN", "PROVISIONING", "ACTIVE"]


@pytest.mark.parametrize("state", ["FAILED", "TERMINATED", "STOPPED"])
def test_create_says_what_to_do_when_it_fails(cloud, state):
    cloud.write("states", f"PROVISIONING\n{state}")
    done = cloud.run("create.sh", "--wait", timeout=60)
    assert done.returncode == 1
    assert f"muse is {state}" in done.stderr
    assert "delete.sh" in done.stderr


def test_install_brings_the_last_commit_to_every_worker(cloud):
    cloud.run("create.sh")
    done = cloud.run("install.sh")
    assert done.returncode == 0, done.stderr
    worker = cloud.folder / "worker"
    assert (worker / "muse_jax" / "muse_jax" / "train.py").exists()
    assert not (worker / "muse_jax" / ".git").exists()
    assert not (worker / "muse_jax.tar.gz").exists()
    [copied] = cloud.calls("scp")
    assert copied[5:] == ["muse:muse_jax.tar.gz", *EVERYWHERE, *WHERE]
    [installed] = cloud.calls("ssh")
    assert set(EVERYWHERE) <= set(installed)
    log = cloud.read("uv.log").splitlines()
    assert log == [
        f"uv venv --quiet --clear --python 3.12 {worker}/muse_venv",
        f"uv pip install --quiet --python {worker}/muse_venv/bin/python --editable {worker}/muse_jax[tpu]",
    ]


def test_another_python_gets_another_environment(cloud):
    """Whatever its version is written in; the same again keeps the environment."""
    cloud.run("create.sh")
    cloud.run("install.sh")
    for _ in range(2):
        cloud.set(PYTHON_VERSION="'>=3.12,<3.13'")
        done = cloud.run("install.sh")
        assert done.returncode == 0, done.stderr
    made = [line for line in cloud.read("uv.log").splitlines() if line.startswith("uv venv")]
    assert [line.split("--python ")[1].split()[0] for line in made] == ["3.12", ">=3.12,<3.13"]


def test_a_dry_run_of_install_can_be_pasted(cloud):
    cloud.run("create.sh")
    dry = cloud.run("install.sh", "--dry-run").stdout
    done = subprocess.run(["bash", "-e", "-c", dry], env=cloud.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "installed on" in done.stdout


def test_a_failed_copy_ends_the_install(cloud):
    assert cloud.run("install.sh").returncode != 0  # there is no slice
    assert not cloud.calls("ssh")


@pytest.mark.parametrize("script", ["install.sh", "start.sh", "stop.sh"])
def test_nodes_that_gcloud_leaves_out_are_an_error(cloud, script):
    """It warns and ends with 0, having done nothing there."""
    cloud.run("create.sh")
    cloud.run("install.sh")
    before = len(cloud.calls())
    cloud.write("unprepared", "1")
    done = cloud.run(script)
    assert done.returncode == 1
    assert len(cloud.calls()) == before + 1
    assert "WARNING: Could not prepare all 1 nodes" in done.stderr
    assert f"{script}: not all nodes of muse were reached" in done.stderr
    assert "ssh-add ~/.ssh/google_compute_engine" in done.stderr
    assert sorted(path.name for path in cloud.folder.glob("*.*")) == ["settings.sh", "uv.log"]  # TMPDIR is there


def _started(cloud, end: str):
    cloud.write("plan", end)
    cloud.run("create.sh")
    cloud.run("install.sh")
    done = cloud.run("start.sh")
    assert done.returncode == 0, done.stderr
    return done


def _status(cloud) -> str:
    script = SCRIPTS / "on_worker.sh"
    environment = {**cloud.environment, "HOME": str(cloud.folder / "worker")}
    done = subprocess.run([script, "status"], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within two minutes"
        time.sleep(0.02)


def test_start_gives_the_arguments_as_they_stand_in_the_settings(cloud):
    _started(cloud, "0")
    _wait_for(lambda: _status(cloud) == "training: exited 0")
    assert cloud.read("starts") == (
        "0 --config=configs/scenes/base.py --workdir=gs://bucket/runs/muse "
        "--config.train.steps=9 --config.data.path=gs://a folder/it's\n"
    )
    assert "step 3" in cloud.read("worker/muse_run/train.log")


def test_training_outlives_the_connection_and_is_not_started_twice(cloud):
    _started(cloud, "stay")  # the shell that ssh ran has ended by now
    assert _status(cloud) == "training: running"
    again = cloud.run("start.sh")
    assert again.returncode == 1
    assert "runs already" in again.stderr
    assert len(cloud.read("starts").splitlines()) <= 1


def test_the_bucket_of_the_data_is_mounted_once(cloud):
    """gcsfuse is installed where it is missing; a mount that has died, or is another bucket's, is made anew."""
    cloud.set(DATA_BUCKET="my-data")
    _started(cloud, "0")
    made = "gcsfuse --implicit-dirs -o ro my-data /mnt/muse_data"
    log = cloud.read("fuse.log").splitlines()
    assert [line for line in log if "install --yes" in line and line.endswith(" gcsfuse")]
    assert log[-1] == made
    _wait_for(lambda: _status(cloud) == "training: exited 0")
    assert cloud.run("start.sh").returncode == 0
    assert cloud.read("fuse.log").splitlines()[len(log) :] == ["stat /mnt/muse_data"]
    _wait_for(lambda: _status(cloud) == "training: exited 0")
    cloud.write("dead", "")
    assert cloud.run("start.sh").returncode == 0
    assert "fusermount -u /mnt/muse_data" in cloud.read("fuse.log")
    assert cloud.read("fuse.log").splitlines()[-1] == made


def test_a_bucket_that_cannot_be_mounted_is_an_error(cloud):
    cloud.set(DATA_BUCKET="my-data")
    cloud.write("bin/gcsfuse", "#!/bin/bash\nexit 4")
    (cloud.folder / "bin/gcsfuse").chmod(0o755)
    cloud.run("create.sh")
    cloud.run("install.sh")
    assert cloud.run("start.sh").returncode == 4
    assert not cloud.read("starts")


def test_start_without_an_environment_is_an_error(cloud):
    cloud.run("create.sh")
    cloud.run("install.sh")
    shutil.rmtree(cloud.folder / "worker" / "muse_venv")
    done = cloud.run("start.sh")
    assert done.returncode == 1
    assert "install it first: install.sh" in done.stderr
    assert "started" not in done.stdout
    assert _status(cloud) == "training: none"


def test_of_several_starts_at_once_one_starts(cloud):
    cloud.write("plan", "stay\n" * 4)
    cloud.run("create.sh")
    cloud.run("install.sh")
    command = [SCRIPTS / "start.sh", f"--settings={cloud.settings}"]
    starting = [subprocess.Popen(command, env=cloud.environment, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    said = [process.communicate(timeout=60)[1] for process in starting]
    assert sorted(process.returncode for process in starting) == [0, 1, 1, 1]
    assert sum("runs already" in words for words in said) == 3
    _wait_for(lambda: cloud.read("starts"))
    assert len(cloud.read("starts").splitlines()) == 1


def test_stop_waits_for_the_run_to_save(cloud):
    _started(cloud, "stay")
    _wait_for(lambda: cloud.read("starts"))
    done = cloud.run("stop.sh")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "training: exited 143"


def test_a_run_that_does_not_end_is_killed(cloud):
    cloud.write("training", cloud.read("training").replace("'exit 143'", "''"))
    _started(cloud, "stay")
    _wait_for(lambda: cloud.read("starts"))
    cloud.environment["STOP_SECONDS"] = "0"
    done = cloud.run("stop.sh")
    assert "killing it" in done.stderr
    assert done.stdout.strip() == "training: exited 137"


def test_a_run_that_vanished_is_lost(cloud):
    _started(cloud, "0")
    _wait_for(lambda: _status(cloud) == "training: exited 0")
    (cloud.folder / "worker/muse_run/exit_code").unlink()  # as after a restart of the machine
    assert _status(cloud) == "training: lost"


def test_logs_follow_the_first_worker_or_all(cloud):
    _started(cloud, "0")
    _wait_for(lambda: _status(cloud) == "training: exited 0")
    for flags, nodes in [([], ["--node=0", "--worker=0"]), (["--all"], EVERYWHERE)]:
        done = cloud.run("logs.sh", *flags)
        assert done.stdout == "step 3\n"
        assert set(nodes) <= set(cloud.calls("ssh")[-1])


def test_delete_deletes_the_slice_too_and_asks_unless_told(cloud):
    cloud.run("create.sh")
    assert cloud.run("delete.sh").returncode == 0
    cloud.run("create.sh")
    assert cloud.run("delete.sh", "--yes").returncode == 0
    assert [call[4:] for call in cloud.calls("delete")] == [
        ["muse", "--force", *WHERE],
        ["muse", "--force", "--quiet", *WHERE],
    ]


def test_watch_makes_a_preempted_slice_anew_and_training_goes_on(cloud):
    cloud.write("plan", "preempt\npreempt\n0")
    done = cloud.run("watch.sh", "--delete-when-finished")
    assert done.returncode == 0, done.stderr
    verbs = [call[3] for call in cloud.calls() if call[3] in ("create", "delete", "scp")]
    assert verbs == ["create", "scp", "delete"] * 3
    starts = [line.split(" ", 1) for line in cloud.read("starts").splitlines()]
    assert [int(step) for step, _ in starts] == [0, 3, 6]  # each goes on from the bucket
    assert len({command for _, command in starts}) == 1  # with the same command
    assert done.stdout.count("muse: SUSPENDED") == 2
    assert "training is finished: gs://bucket/runs/muse" in done.stdout
    assert not (cloud.folder / "slice").exists()


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED", "PREEMPTED"])
def test_watch_starts_from_a_slice_that_is_already_gone(cloud, state):
    cloud.run("create.sh")
    cloud.write("slice", state)
    assert cloud.run("watch.sh").returncode == 0
    assert [len(cloud.calls(verb)) for verb in ("create", "delete")] == [2, 1]
    assert cloud.read("bucket_steps") == "3\n"


def test_watch_sees_a_preempted_node_behind_an_active_resource(cloud):
    cloud.run("create.sh")
    cloud.write("node_state", "PREEMPTED")
    watching = subprocess.Popen(
        [SCRIPTS / "watch.sh", f"--settings={cloud.settings}"], env=cloud.environment, stdout=subprocess.PIPE, text=True
    )
    _wait_for(lambda: cloud.calls("delete"))
    (cloud.folder / "node_state").unlink()
    output, _ = watching.communicate(timeout=300)
    assert "muse: PREEMPTED" in output
    assert watching.returncode == 0
    assert cloud.read("bucket_steps") == "3\n"


def test_watch_does_nothing_to_a_slice_that_it_cannot_ask_about(cloud):
    cloud.run("create.sh")
    cloud.write("states", "BROKEN\nBROKEN\nWAITING_FOR_RESOURCES\nPROVISIONING")
    done = cloud.run("watch.sh")
    assert done.returncode == 0, done.stderr
    assert not cloud.calls("delete")
    assert len(cloud.calls("create")) == 1
    assert "503" in done.stderr


@pytest.mark.parametrize("command", [["watch.sh"], ["create.sh", "--wait"]])
def test_a_gcloud_that_can_never_tell_ends_the_watch(cloud, command):
    cloud.set(MAX_UNREACHABLE="3")
    if command == ["watch.sh"]:
        cloud.run("create.sh")
    cloud.write("states", "BROKEN\n" * 3 + "PROVISIONING\n" + "BROKEN\n" * 50)
    done = cloud.run(*command, timeout=60)
    assert done.returncode == 1
    assert "gcloud could not tell the state of muse, 4 times in a row" in done.stderr
    assert "gcloud auth login" in done.stderr
    assert len(cloud.calls("describe")) == 3 + 1 + 4


@pytest.mark.parametrize("script", COMMANDS)
def test_a_missing_gcloud_is_said_at_once(cloud, script):
    """And not asked for where nothing is done."""
    (cloud.folder / "bin" / "gcloud").unlink()
    for name in ("bash", "basename", "dirname", "git", "grep", "mktemp", "rm", "sed", "tee"):
        (cloud.folder / "bin" / name).symlink_to(shutil.which(name))
    cloud.environment["PATH"] = str(cloud.folder / "bin")
    done = cloud.run(script, timeout=60)
    assert done.returncode == 1
    assert done.stderr == f"{script}: gcloud is not installed here: https://cloud.google.com/sdk/docs/install\n"
    assert cloud.run(script, "--dry-run").returncode == 0


def test_watch_restarts_a_run_that_was_told_to_go(cloud):
    cloud.write("plan", "143\n143\n143\n143\n0")  # more often than MAX_CRASHES: it is no crash
    done = cloud.run("watch.sh")
    assert done.returncode == 0, done.stderr
    assert cloud.read("bucket_steps") == "15\n"
    assert len(cloud.calls("create")) == 1
    assert "crash" not in done.stdout


def test_watch_gives_up_after_so_many_crashes_in_a_row(cloud):
    cloud.write("plan", "1\n1\n1\n1\n0")
    done = cloud.run("watch.sh")
    assert done.returncode == 1
    assert "crashed 3 times in a row; logs.sh shows why" in done.stderr
    assert len(cloud.read("starts").splitlines()) == 3
    assert not cloud.calls("delete")  # what it was can still be looked at


@pytest.mark.parametrize("why", ["refused", "unprepared"])
def test_watch_counts_a_crash_once_however_often_it_cannot_start_again(cloud, why):
    _started(cloud, "1\n0")
    _wait_for(lambda: _status(cloud) == "training: exited 1")
    cloud.write(why, "\n".join("12345"))  # connections, more than MAX_CRASHES
    done = cloud.run("watch.sh")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("crash 1 of at most 2") == 1
    assert "crash 2" not in done.stdout
    assert done.stdout.count("could not start; trying again") >= 3


def test_watch_gives_up_on_workers_that_never_answer(cloud):
    """One is silent for good, though the slice is ACTIVE and the others answer."""
    _started(cloud, "stay")
    cloud.set(MAX_UNREACHABLE="3")
    cloud.write("silent", "x\n" * 50)
    done = cloud.run("watch.sh", timeout=60)
    assert done.returncode == 1
    assert "not all workers of muse answered, 4 times in a row, though it is ACTIVE" in done.stderr
    assert "No route to host" in done.stderr
    assert not cloud.calls("delete")  # the training may still run there


def test_watch_waits_for_workers_that_answer_again(cloud):
    _started(cloud, "0")
    cloud.set(MAX_UNREACHABLE="3")
    cloud.write("silent", "1\n2\n3")
    done = cloud.run("watch.sh")
    assert done.returncode == 0, done.stderr
    assert "training: unreachable" in done.stdout


@pytest.mark.parametrize("script", COMMANDS)
def test_dry_run_says_what_it_would_do_and_does_nothing(cloud, script):
    done = cloud.run(script, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "gcloud compute tpus queued-resources" in done.stdout
    assert cloud.calls() == []
    assert sorted(path.name for path in cloud.folder.iterdir()) == ["bin", "settings.sh", "training"]


@pytest.mark.parametrize("script", ["create.sh", "start.sh", "delete.sh"])
def test_dry_run_prints_the_very_command(cloud, script):
    dry = cloud.run(script, "--dry-run").stdout
    cloud.run("create.sh")
    (cloud.folder / "calls").unlink()
    if script == "create.sh":
        (cloud.folder / "slice").unlink()
    cloud.run(script)
    subprocess.run(["bash", "-c", dry], env=cloud.environment, capture_output=True, check=False)
    real, pasted = cloud.calls()
    assert real == pasted


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("PROJECT", "YOUR_PROJECT", "PROJECT is still YOUR_PROJECT"),
        ("ZONE", "", "ZONE is not set"),
        ("NAME", "Muse", "NAME is 'Muse'"),
        ("SLICES", "0", "SLICES is '0'"),
        ("CAPACITY", "cheap", "on-demand, spot or reserved"),
        ("WORKDIR", "/tmp/run", "must be in a bucket"),
        ("WORKDIR", "gs://", "must be in a bucket"),
        ("WORKDIR", "'gs:// a/b'", "must be in a bucket"),
        ("TRAIN_ARGS", "(--workdir=/tmp/x)", "TRAIN_ARGS has '--workdir=/tmp/x', which CONFIG or WORKDIR says"),
        ("TRAIN_ARGS", "(--config configs/base_3b.py)", "TRAIN_ARGS has '--config'"),
        ("TRAIN_ARGS", "(--config.data.path=gs://YOUR_BUCKET)", "has YOUR_ in it still"),
        ("SSH_ARGS", "(--account=YOUR_ACCOUNT)", "has YOUR_ in it still"),
        ("DATA_BUCKET", "YOUR_BUCKET", "has YOUR_ in it still"),
        ("DATA_BUCKET", "gs://my-data", "a bucket's name alone, without gs://"),
        ("POLL_SECONDS", "soon", "POLL_SECONDS is 'soon'"),
        ("MAX_UNREACHABLE", "never", "MAX_UNREACHABLE is 'never'"),
        ("CREATE_ARGS", "'--one=1 --two=2'", "CREATE_ARGS must be a list in parentheses"),
        ("ACCELERATOR_TYPE", "v3-8", "v4-N, v5litepod-N (v5e), v5p-N or v6e-N"),
        ("ACCELERATOR_TYPE", "v4-7", "expected is a multiple of 8"),
        ("ACCELERATOR_TYPE", "v6e-12", "slices have 1, 4, 8"),
        ("ZONE", "'us central2'", "ZONE is 'us central2'"),
        ("ZONE", "us-central2", "expected is one as us-central2-b"),
        ("SLICES", "99999999999999999999", "a whole number from 1 to 9999"),
        ("NAME", f"{'m' * 61}; SLICES=12", "and names have at most 63 characters"),
        ("CONFIG", "configs/none.py", "CONFIG is 'configs/none.py', which is no file of this checkout"),
        ("ACCELERATOR_TYPE", "v4-4x8x8", "after the last hyphen a number"),
    ],
)
def test_settings_that_cannot_work_fail_before_anything_is_asked_for(cloud, setting, value, said):
    cloud.set(**{setting: value})
    done = cloud.run("watch.sh")
    assert done.returncode == 1
    assert said in done.stderr
    assert str(cloud.settings) in done.stderr
    assert cloud.calls() == []


def test_windows_line_ends_are_named(cloud):
    cloud.settings.write_bytes(cloud.settings.read_bytes().replace(b"\n", b"\r\n"))
    done = cloud.run("start.sh", "--dry-run")
    assert done.returncode == 1
    assert "Windows' line ends (CRLF)" in done.stderr
    mend = done.stderr.rsplit(": ", 1)[1]
    subprocess.run(["bash", "-c", mend], check=True)
    assert cloud.run("start.sh", "--dry-run").returncode == 0


@pytest.mark.parametrize("script", COMMANDS)
def test_unknown_flags_and_missing_settings_are_errors(cloud, script):
    assert "unknown flag '--bogus'" in cloud.run(script, "--bogus").stderr
    done = subprocess.run([SCRIPTS / script, "--settings", "mine.sh"], capture_output=True, text=True, check=False)
    assert "unknown flag '--settings'" in done.stderr, "before the settings that it would take instead"
    cloud.settings.unlink()
    done = cloud.run(script)
    assert done.returncode == 1
    assert "there is no settings file" in done.stderr
    assert cloud.calls() == []


def test_the_settings_are_those_of_the_file_named(cloud, tmp_path):
    """Not of another with its name along PATH, and not what the shell exports; whatever CDPATH says."""
    here = tmp_path / "here"
    here.mkdir()
    (here / "mine.sh").write_text(cloud.settings.read_text().replace("NAME=muse\n", ""))
    (tmp_path / "bin" / "mine.sh").write_text(cloud.settings.read_text())
    environment = cloud.environment | {"NAME": "exported", "CDPATH": f"{SCRIPTS.parent.parent}:{here}"}
    command = ["bash", "launch/tpu_vm/start.sh", "--settings=mine.sh", "--dry-run"]
    (here / "launch").symlink_to(SCRIPTS.parent)
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "start.sh: ./mine.sh: NAME is not set\n"


@pytest.mark.parametrize("script", COMMANDS)
def test_help_is_the_comment_at_the_top(cloud, script):
    done = cloud.run(script, "--help")
    assert done.returncode == 0
    assert script in done.stdout
    assert "--settings=FILE" in done.stdout
    assert "set -euo" not in done.stdout


def test_the_settings_file_of_the_repository_names_what_must_be_filled_in():
    done = subprocess.run([SCRIPTS / "create.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "YOUR_PROJECT" in done.stderr


def test_every_script_is_strict_bash():
    for script in [*COMMANDS, "on_worker.sh"]:
        text = (SCRIPTS / script).read_text()
        assert text.startswith("#!/usr/bin/env bash\n"), script
        assert "\nset -euo pipefail\n" in text, script


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    command = ["shellcheck", "-x", *sorted(path.name for path in SCRIPTS.glob("*.sh"))]
    # in their folder, where shellcheck looks for what they source
    done = subprocess.run(command, cwd=SCRIPTS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
