"""The settings, topologies, manifests and commands of launch/gke."""

import copy
import os
import pathlib
import re
import signal
import subprocess
import sys

import jobset
import kubernetes_schema
import pytest
import tpus
import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
GKE = ROOT / "launch" / "gke"
SETTINGS = """
name = "muse"
accelerator = "v4"
topology = "4x8x8"
config = "configs/scenes/base.py"
bucket = "gs://bucket/runs/"
image = "registry/muse_jax:1"
train_args = ["--config.train.steps=9", "--config.data.path=gs://a folder/it's"]
[env]
LIBTPU_INIT_ARGS = "--a=b --c"
[cluster]
project = "my-project"
zone = "us-central2-b"
name = "my-cluster"
"""


@pytest.fixture
def settings_file(tmp_path):
    """Writes a settings file with some lines changed: name="value" replaces the line of that name, or adds it."""

    def write(**values) -> pathlib.Path:
        text = SETTINGS
        for name, value in values.items():
            line = f"{name} = {value}"
            text, found = re.subn(rf"^{name} = .*$", lambda _, line=line: line, text, count=1, flags=re.MULTILINE)
            text = text if found else f"{line}\n{text}"
        path = tmp_path / "settings.toml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def settings(settings_file):
    return lambda **values: jobset.load_settings(settings_file(**values))


def _job(manifest):
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]


def _pod(manifest):
    return _job(manifest)["template"]["spec"]


# From the published tables of slice shapes.
@pytest.mark.parametrize(
    ("accelerator", "topology", "chips", "hosts", "per_host", "name", "machine"),
    [
        ("v4", "2x2x1", 4, 1, 4, "v4-8", "ct4p-hightpu-4t"),
        ("v4", "2x2x4", 16, 4, 4, "v4-32", "ct4p-hightpu-4t"),
        ("v4", "4x8x8", 256, 64, 4, "v4-512", "ct4p-hightpu-4t"),
        ("v4", "16x16x16", 4096, 1024, 4, "v4-8192", "ct4p-hightpu-4t"),
        ("v5p", "2x2x2", 8, 2, 4, "v5p-16", "ct5p-hightpu-4t"),
        ("v5p", "16x16x24", 6144, 1536, 4, "v5p-12288", "ct5p-hightpu-4t"),
        ("v5e", "1x1", 1, 1, 1, "v5litepod-1", "ct5lp-hightpu-1t"),
        ("v5e", "4x4", 16, 4, 4, "v5litepod-16", "ct5lp-hightpu-4t"),
        ("v6e", "2x2", 4, 1, 4, "v6e-4", "ct6e-standard-4t"),
        ("v6e", "16x16", 256, 64, 4, "v6e-256", "ct6e-standard-4t"),
    ],
)
def test_hosts_and_chips_follow_from_the_topology(accelerator, topology, chips, hosts, per_host, name, machine):
    made = tpus.make_slice(accelerator, topology)
    assert (made.chips, made.hosts, made.chips_per_host) == (chips, hosts, per_host)
    assert (made.accelerator_type, made.machine) == (name, machine)


@pytest.mark.parametrize(
    ("accelerator", "topology", "said"),
    [
        ("v4-512", "4x8x8", "one of v4, v5p, v5e, v6e"),
        ("v3", "4x4", "one of v4, v5p, v5e, v6e"),
        ("v4", "16x16", "needs 3 numbers"),
        ("v4", "4x8x0", "needs 3 numbers"),
        ("v4", "4x8xx8", "needs 3 numbers"),
        ("v4", "4x6x8", "multiples of 4"),
        ("v4", "2x4x8", "multiples of 4"),
        ("v4", "8x4x8", 'write topology = "4x8x8"'),
        ("v4", "16x16x32", "the largest v4 slice has 4096"),
        ("v5p", "16x20x28", "the largest v5p slice has 6144"),
        ("v5e", "4x4x4", "needs 2 numbers"),
        ("v5e", "8x4", 'write topology = "4x8"'),
        ("v6e", "16x32", "must be one of 1x1"),
        ("v6e", "3x3", "must be one of 1x1"),
    ],
)
def test_impossible_slices_are_refused_with_the_mend(accelerator, topology, said):
    with pytest.raises(tpus.SettingsError) as caught:
        tpus.make_slice(accelerator, topology)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"toplogy": '"4x4x4"'}, "toplogy is no setting; did you mean topology?"),
        ({"data_bucket": '"gs://my-data"'}, "a bucket's name alone, without gs://"),
        ({"slices": '"2"'}, "slices = '2' is a str; expected a int"),
        ({"slices": "true"}, "slices = True is a bool"),
        ({"slices": "0"}, "slices = 0 must be at least 1"),
        ({"bucket": '"/data"'}, "must start with gs://"),
        ({"bucket": '"gs://"'}, "must start with gs:// and a bucket's name"),
        ({"bucket": '"gs://b b/x"'}, "must start with gs:// and a bucket's name"),
        ({"image": '""'}, "image = '' must be REGISTRY/NAME:TAG"),
        ({"image": '"a b:c d"'}, "without spaces"),
        ({"config": '" "'}, "config = ' ' is no file of this checkout"),
        ({"config": '"configs/none.py:tiny"'}, "is no file of this checkout"),
        ({"train_args": '["--workdir=/tmp/x"]'}, "'--workdir=/tmp/x', which bucket and name says"),
        ({"train_args": '["-workdir", "/tmp/x"]'}, "'-workdir', which bucket and name says"),
        ({"train_args": '["--config=configs/base_3b.py"]'}, "which config says"),
        ({"train_args": '["--config.data.path=gs://YOUR_BUCKET/x"]'}, "train_args is still"),
        ({"LIBTPU_INIT_ARGS": '"YOUR_ARGS"'}, "env is still"),
        ({"max_restarts": "99999999999"}, "below 2^31"),
        ({"capacity": '"reservation:/"'}, '"on-demand", "spot" or "reservation:NAME"'),
        ({"service_account": '"Bad Name!"'}, "service_account = 'Bad Name!' must be lower-case"),
        ({"queue": '"Bad Queue!"'}, "queue = 'Bad Queue!' must be lower-case"),
        ({"bucket": '"gs://YOUR_BUCKET"'}, "bucket is still"),
        ({"name": '"Muse"'}, "lower-case letters"),
        ({"name": f'"{"m" * 60}"'}, "shorten it by"),
        ({"capacity": '"cheap"'}, '"on-demand", "spot" or "reservation:NAME"'),
        ({"train_args": "[1]"}, "a list of strings"),
        ({"topology": '"2x2x1"', "slices": "2"}, "GKE joins only slices of several"),
        ({"topology": '"4x8"'}, "needs 3 numbers"),
        ({"LIBTPU_INIT_ARGS": "1"}, "write it in quotes"),
    ],
)
def test_settings_that_cannot_work_name_the_file_and_the_mend(settings, values, said):
    with pytest.raises(tpus.SettingsError) as caught:
        settings(**values)
    assert said in str(caught.value)
    assert "settings.toml" in str(caught.value)


@pytest.mark.parametrize("name", ["", "A=B", "A B", "1A"])
def test_variables_that_kubernetes_refuses_are_named(settings_file, name):
    path = settings_file()
    path.write_text(path.read_text().replace("LIBTPU_INIT_ARGS", f'"{name}"'))
    with pytest.raises(tpus.SettingsError, match=f"env.'{name}' is no name of a variable"):
        jobset.load_settings(path)


def test_missing_settings_and_files_are_named(tmp_path):
    with pytest.raises(tpus.SettingsError, match="copy"):
        jobset.load_settings(tmp_path / "none.toml")
    (tmp_path / "some.toml").write_text('name = "muse"')
    with pytest.raises(tpus.SettingsError, match="accelerator, topology, config, bucket, image must be set"):
        jobset.load_settings(tmp_path / "some.toml")
    (tmp_path / "broken.toml").write_text("name = muse")
    with pytest.raises(tpus.SettingsError, match="is not TOML"):
        jobset.load_settings(tmp_path / "broken.toml")
    (tmp_path / "broken.toml").write_bytes(b"\xff")
    with pytest.raises(tpus.SettingsError, match="is not TOML"):
        jobset.load_settings(tmp_path / "broken.toml")
    with pytest.raises(tpus.SettingsError, match="can't be read"):
        jobset.load_settings(tmp_path)
    (tmp_path / "some.toml").write_text('name = "muse"\ncluster = "mine"')
    with pytest.raises(tpus.SettingsError, match=r"cluster = 'mine' is no table; write it as \[cluster\]"):
        jobset.load_settings(tmp_path / "some.toml")


def test_the_manifest_is_one_pod_a_host_and_one_job_a_slice(settings):
    manifest = jobset.manifest(settings(slices="3"))
    job, pod = _job(manifest), _pod(manifest)
    assert manifest["spec"]["replicatedJobs"][0]["replicas"] == 3
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (64, 64, "Indexed")
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v4-podslice",
        "cloud.google.com/gke-tpu-topology": "4x8x8",
    }
    [container] = pod["containers"]
    assert container["resources"] == {"requests": {"google.com/tpu": "4"}, "limits": {"google.com/tpu": "4"}}
    assert container["imagePullPolicy"] == "Always"  # a tag that was pushed again is another image
    assert container["command"] == [
        *["python", "-m", "muse_jax.train", "--config=configs/scenes/base.py", "--workdir=gs://bucket/runs/muse"],
        *["--config.train.steps=9", "--config.data.path=gs://a folder/it's"],
    ]
    assert container["env"] == [{"name": "LIBTPU_INIT_ARGS", "value": "--a=b --c"}]


def test_all_hosts_restart_together_and_preemptions_are_not_counted(settings):
    manifest = jobset.manifest(settings(max_restarts="7"))
    policy, job = manifest["spec"]["failurePolicy"], _job(manifest)
    assert policy["maxRestarts"] == 7
    assert job["backoffLimit"] == 0
    assert _pod(manifest)["restartPolicy"] == "Never"  # which a podFailurePolicy needs
    # The rule forgives a Job that failed by its podFailurePolicy: after a disruption or exit code 143.
    assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert policy["rules"][0]["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    disruption, saved = job["podFailurePolicy"]["rules"]
    assert disruption["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert saved["onExitCodes"]["values"] == [143]
    assert saved["onExitCodes"]["containerName"] == _pod(manifest)["containers"][0]["name"]


def test_exit_codes_are_those_that_train_uses():
    from muse_jax.training import signals, watchdog

    assert signals.Stopped(signal.SIGTERM, 1).exit_code == jobset.EXIT_PREEMPTED
    assert set(jobset.EXIT_AGAIN) == {watchdog.FAILED, watchdog.STUCK}


def test_hosts_find_each_other(settings):
    manifest = jobset.manifest(settings())
    assert manifest["spec"]["network"]["enableDNSHostnames"] is True
    assert "alpha.jobset.sigs.k8s.io/exclusive-topology" in manifest["metadata"]["annotations"]


def test_capacity_queue_account_and_network(settings):
    pod = _pod(jobset.manifest(settings(capacity='"spot"')))
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert "cloud.google.com/gke-spot" in [toleration["key"] for toleration in pod["tolerations"]]
    pod = _pod(jobset.manifest(settings(capacity='"reservation:mine"')))
    assert pod["nodeSelector"]["cloud.google.com/reservation-name"] == "mine"
    pod = _pod(jobset.manifest(settings(capacity='"reservation:projects/theirs/reservations/mine"')))
    assert pod["nodeSelector"]["cloud.google.com/reservation-name"] == "mine"  # a label can't hold the rest
    manifest = jobset.manifest(settings(queue='"tpus"', service_account='"writer"', host_network="true"))
    assert manifest["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "tpus"}
    assert _pod(manifest)["serviceAccountName"] == "writer"
    assert _pod(manifest)["dnsPolicy"] == "ClusterFirstWithHostNet"  # or hosts would not be found by name


def test_the_bucket_of_the_data_is_mounted(settings):
    template = _job(jobset.manifest(settings(data_bucket='"my-data"', host_network="true")))["template"]
    assert template["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    [container] = template["spec"]["containers"]
    assert {"name": "data", "mountPath": "/data", "readOnly": True} in container["volumeMounts"]
    assert template["spec"]["volumes"][1]["csi"] == {
        "driver": "gcsfuse.csi.storage.gke.io",
        "readOnly": True,
        "volumeAttributes": {
            "bucketName": "my-data",
            "mountOptions": "implicit-dirs",
            "hostNetworkPodKSA": "true",
        },
    }
    assert "metadata" not in _job(jobset.manifest(settings()))["template"]


VARIANTS = [
    {},
    {"data_bucket": '"my-data"'},
    {"slices": "2", "capacity": '"spot"', "host_network": "true"},
    {"accelerator": '"v6e"', "topology": '"1x1"', "queue": '"q"', "service_account": '"a"'},
    {"accelerator": '"v5e"', "topology": '"16x16"', "capacity": '"reservation:mine"'},
]


@pytest.mark.parametrize("values", VARIANTS)
def test_manifests_fit_the_schema(settings, values):
    pytest.importorskip("kubernetes", reason="the kubernetes package, of the test extra, is not installed")
    kubernetes_schema.check_jobset(yaml.safe_load(jobset.manifest_text(settings(**values))))


def _without(*path):
    def change(manifest):
        for step in path[:-1]:
            manifest = manifest[step]
        del manifest[path[-1]]

    return change


def _with(value, *path):
    def change(manifest):
        for step in path[:-1]:
            manifest = manifest[step]
        manifest[path[-1]] = value

    return change


JOB = ("spec", "replicatedJobs", 0, "template", "spec")
POD = (*JOB, "template", "spec")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_without("spec", "replicatedJobs"), "replicatedJobs"),
        (_without("spec", "replicatedJobs", 0, "name"), "name"),
        (_without("spec", "failurePolicy", "rules", 0, "action"), "action"),
        (_with("Restart", "spec", "failurePolicy", "rules", 0, "action"), "'Restart' is not allowed"),
        (_with("v1", "apiVersion"), "is no JobSet"),
        (_with(1, "spec", "max_restarts"), "max_restarts is unknown"),
        (_with("64", *JOB, "parallelism"), "'64' is a str, not a int"),
        (_without(*POD, "containers"), "containers"),
        (_without(*POD, "containers", 0, "name"), "name"),
        (_with({}, *POD, "nodeSelectors"), "nodeSelectors is unknown to V1PodSpec"),
        (_with(True, *POD, "nodeSelector", "cloud.google.com/gke-spot"), "True is a bool, not a str"),
        (_without(*JOB, "podFailurePolicy", "rules", 1, "onExitCodes", "operator"), "operator"),
    ],
)
def test_the_schema_check_finds_what_is_wrong(settings, change, said):
    pytest.importorskip("kubernetes", reason="the kubernetes package, of the test extra, is not installed")
    manifest = copy.deepcopy(jobset.manifest(settings()))
    change(manifest)
    with pytest.raises(kubernetes_schema.Misfit, match=re.escape(said)):
        kubernetes_schema.check_jobset(manifest)


def test_the_same_run_through_xpk(settings):
    words = jobset.xpk_command(settings(slices="2", capacity='"spot"'))
    assert words[:3] == ["xpk", "workload", "create"]
    assert {"--cluster=my-cluster", "--project=my-project", "--zone=us-central2-b", "--workload=muse"} <= set(words)
    assert {"--tpu-type=v4-4x8x8", "--num-slices=2", "--spot", "--docker-image=registry/muse_jax:1"} <= set(words)
    assert {"--max-restarts=20", "--restart-on-exit-codes=1,124", "--env=LIBTPU_INIT_ARGS=--a=b --c"} <= set(words)
    # xpk gives the command to a shell: what arrives must be what the JobSet says
    command = words[-1].removeprefix("--command=exec ")
    said = subprocess.run(["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True)
    assert said.stdout.splitlines() == _pod(jobset.manifest(settings()))["containers"][0]["command"]


@pytest.mark.parametrize("name", ["data_bucket", "service_account", "queue"])
def test_what_xpk_cannot_be_told_is_not_dropped(settings, name):
    with pytest.raises(tpus.SettingsError, match=f"{name} = 'mine' can't be told to xpk"):
        jobset.xpk_command(settings(**{name: '"mine"'}))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("zone", "us-central2", "a zone, as us-central2-b"),
        ("zone", "us central2-b", "a zone"),
        ("project", "a b", "lower"),
    ],
)
def test_a_cluster_that_cannot_be(settings_file, name, value, said):
    path = settings_file()
    path.write_text(re.sub(rf"^{name} = .*$", f'{name} = "{value}"', path.read_text(), flags=re.MULTILINE))
    made = jobset.load_settings(path)
    for commands in (jobset.nodepool_commands, jobset.xpk_command):
        with pytest.raises(tpus.SettingsError, match=f"cluster.{name} = '{value}' must be {said}"):
            commands(made)


def test_one_node_pool_a_slice(settings):
    first, second = jobset.nodepool_commands(settings(slices="2", capacity='"reservation:mine"'))
    assert first[:5] == ["gcloud", "container", "node-pools", "create", "muse-0"]
    assert second[4] == "muse-1"
    assert {"--machine-type=ct4p-hightpu-4t", "--tpu-topology=4x8x8", "--num-nodes=64"} <= set(first)
    assert {"--reservation-affinity=specific", "--reservation=mine", "--location=us-central2"} <= set(first)


@pytest.mark.parametrize(("accelerator", "topology"), [("v6e", "1x1"), ("v5e", "2x2"), ("v4", "2x2x1")])
def test_a_single_host_is_asked_for_without_its_topology(settings, accelerator, topology):
    """Which GKE refuses; the label of its node has it, so that the pod finds it."""
    made = settings(accelerator=f'"{accelerator}"', topology=f'"{topology}"')
    [command] = jobset.nodepool_commands(made)
    assert "--num-nodes=1" in command
    assert not [word for word in command if "topology" in word]
    assert _pod(jobset.manifest(made))["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology


@pytest.mark.parametrize(
    ("make", "longest", "said"),
    [
        (jobset.nodepool_commands, 37, "too long for a node pool: 41 characters of 40; shorten name by 1."),
        (jobset.xpk_command, 40, "too long for a workload: 41 characters of 40; shorten name by 1."),
    ],
)
def test_names_that_fit_a_pod_and_nothing_else(settings, make, longest, said):
    values = {"topology": '"2x2x2"', "slices": "11"}
    make(settings(name=f'"{"m" * longest}"', **values))
    with pytest.raises(tpus.SettingsError, match=said):
        make(settings(name=f'"{"m" * (longest + 1)}"', **values))


@pytest.mark.parametrize("topology", ["1x1", "2x2"])
def test_slices_that_xpk_does_not_know(settings, topology):
    with pytest.raises(tpus.SettingsError, match="unknown to xpk, whose smallest is 2x4"):
        jobset.xpk_command(settings(accelerator='"v5e"', topology=f'"{topology}"'))


GCLOUD_WITH_POOLS = """#!/bin/bash
echo "$*" >>{folder}/calls
if [ "$3" = list ]; then cat {folder}/pools; exit; fi
if grep -q "^$4\t" {folder}/pools; then echo "Already exists" >&2; exit 1; fi
[ "$4" != {fails} ] || exit 3
printf '%s\\tRUNNING\\n' "$4" >>{folder}/pools
"""


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Stand-ins of the programs that jobset.py runs; returns what they were called with, and given."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name in ("kubectl", "xpk", "gcloud", "docker"):
        (binaries / name).write_text(f'#!/bin/bash\necho "{name} $*" >>{tmp_path}/calls\ncat >>{tmp_path}/given\n')
        (binaries / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{binaries}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(sys, "stdin", subprocess.DEVNULL)

    def read(name):
        path = tmp_path / name
        return path.read_text() if path.exists() else ""

    return read


def test_apply_gives_the_manifest_to_kubectl(tool, settings_file):
    path = settings_file()
    assert jobset.main(["apply", f"--settings={path}"]) == 0
    assert tool("calls") == "kubectl apply --filename=-\n"
    assert yaml.safe_load(tool("given")) == jobset.manifest(jobset.load_settings(path))


def test_logs_begin_before_the_last_ten_lines(tool, settings_file):
    """Which is all that kubectl shows where pods are selected by labels."""
    assert jobset.main(["logs", f"--settings={settings_file()}"]) == 0
    assert "--tail=100" in tool("calls").split()


def test_a_failed_command_ends_with_its_code(tool, settings_file, tmp_path):
    (tmp_path / "bin" / "docker").write_text("#!/bin/bash\nexit 7\n")
    assert jobset.main(["image", f"--settings={settings_file()}"]) == 7


def test_node_pools_go_on_with_what_is_missing(tool, settings_file, tmp_path, capsys):
    """The second of three can't be had at first; what failed in between is to be deleted by its owner."""
    gcloud, pools = tmp_path / "bin" / "gcloud", tmp_path / "pools"
    pools.write_text("default-pool\tRUNNING\n")
    command = ["nodepools", f"--settings={settings_file(slices='3')}"]
    gcloud.write_text(GCLOUD_WITH_POOLS.format(folder=tmp_path, fails="muse-1"))
    assert jobset.main(command) == 3
    gcloud.write_text(GCLOUD_WITH_POOLS.format(folder=tmp_path, fails="none"))
    pools.write_text(f"{pools.read_text()}muse-1\tERROR\n")
    assert jobset.main(command) == 1
    assert "delete it first: gcloud container node-pools delete muse-1 --project=my-project" in capsys.readouterr().err
    pools.write_text(pools.read_text().replace("muse-1\tERROR\n", ""))
    assert jobset.main(command) == 0
    assert "muse-0 is there already: RUNNING" in capsys.readouterr().out
    made = [call.split()[3] for call in tool("calls").splitlines() if " create " in call]
    assert made == ["muse-0", "muse-1", "muse-1", "muse-2"]


@pytest.mark.parametrize("action", list(jobset.ACTIONS))
def test_dry_run_prints_and_does_nothing(tool, settings_file, capsys, action):
    assert jobset.main([action, f"--settings={settings_file()}", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert tool("calls") == ""
    program = {"image": "docker", "nodepools": "gcloud", "xpk": "xpk"}.get(action, "kubectl")
    assert action == "show" or f"{program} " in printed
    if action == "nodepools":  # those there are stay, so that the real run asks first
        assert printed.startswith("gcloud container node-pools list --project=my-project")
    if action in ("show", "apply"):
        assert yaml.safe_load(printed)["kind"] == "JobSet"  # the command below it is a comment


def test_the_generator_runs_as_a_command(settings_file):
    command = [sys.executable, GKE / "jobset.py", "show", f"--settings={settings_file(slices='0')}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "slices = 0 must be at least 1" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("module", ["yaml", "tomllib"])
def test_a_python_that_lacks_something_is_told_so(settings_file, module):
    code = f"import sys, runpy; sys.modules[{module!r}] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    command = [sys.executable, "-c", code, GKE / "jobset.py"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(GKE)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "needs Python 3.11 or newer, and PyYAML: pip install pyyaml" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_settings_file_of_the_repository_needs_only_to_be_filled_in(tmp_path):
    with pytest.raises(tpus.SettingsError, match="put your own value in its place"):
        jobset.load_settings(GKE / "settings.toml")
    filled = (GKE / "settings.toml").read_text().replace("YOUR_", "my-").lower()
    (tmp_path / "settings.toml").write_text(filled)
    assert jobset.load_settings(tmp_path / "settings.toml").slice.hosts == 64


def test_the_image_has_what_the_command_needs():
    dockerfile = (GKE / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (.+) \S+$", dockerfile, flags=re.MULTILINE)
    assert copied[-1] == "."
    for name in " ".join(copied).split():
        assert (ROOT / name).exists(), name
    ignored = (GKE / "Dockerfile.dockerignore").read_text().split()
    assert {".git", "runs"} <= set(ignored)
    assert not {"configs", "muse_jax"} & set(ignored)
