"""Runs a training on GKE: python launch/gke/jobset.py ACTION [--settings=FILE] [--dry-run].

Actions, in the order of a first run:
  image      build the image and push it
  nodepools  create one node pool a slice, where it is not there yet
  show       print the JobSet manifest
  apply      give the manifest to the cluster: kubectl apply
  xpk        the same run through xpk instead, in a cluster that `xpk cluster create` made; there a preemption counts
             to max_restarts
  logs       follow the first host
  delete     end the run; its checkpoints stay

Everything is derived from one small settings file. With --dry-run the commands are printed and nothing is done.
"""

import argparse
import dataclasses
import difflib
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import tpus
from tpus import SettingsError

try:
    import tomllib

    import yaml
except ImportError as error:
    sys.exit(f"{error}: jobset.py needs Python 3.11 or newer, and PyYAML: pip install pyyaml")

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CONTAINER = "train"
# What train exits with after SIGTERM, its step saved (muse_jax/train.py).
EXIT_PREEMPTED = 143
# What a host ends with that may do better next time: one whose peer was lost, and one that was stuck
# (muse_jax/training/watchdog.py).
EXIT_AGAIN = (1, 124)
FIRST_HOST = "batch.kubernetes.io/job-name={name}-slice-0,batch.kubernetes.io/job-completion-index=0"
# Pod names must not be longer, and have the name of the JobSet in them.
LONGEST_NAME = 63
# Of a node pool for GKE, and of a workload for xpk.
LONGEST_POOL = 40
# Where a pod finds data_bucket.
DATA = "/data"


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Where the run goes; only `nodepools` and `xpk` need it, since kubectl has its own context."""

    project: str = ""
    zone: str = ""
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings file; launch/gke/settings.toml says what each value is."""

    name: str
    accelerator: str
    topology: str
    config: str
    bucket: str
    image: str
    slices: int = 1
    capacity: str = "on-demand"
    data_bucket: str = ""
    train_args: list[str] = dataclasses.field(default_factory=list)
    max_restarts: int = 20
    grace_seconds: int = 300
    service_account: str = ""
    queue: str = ""
    host_network: bool = False
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    cluster: Cluster = dataclasses.field(default_factory=Cluster)

    @property
    def workdir(self) -> str:
        """The run's folder in the bucket."""
        return f"{self.bucket.rstrip('/')}/{self.name}"

    @property
    def slice(self) -> tpus.Slice:
        """One of the slices."""
        return tpus.make_slice(self.accelerator, self.topology)

    @property
    def command(self) -> list[str]:
        """What every host runs; the exec form, so that SIGTERM reaches the training itself."""
        return [
            "python",
            "-m",
            "muse_jax.train",
            f"--config={self.config}",
            f"--workdir={self.workdir}",
            *self.train_args,
        ]


def load_settings(path: pathlib.Path) -> Settings:
    """Reads a settings file.

    Raises:
      SettingsError: naming the file, the setting and the mend.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"there is no {path}; copy {HERE / 'settings.toml'} and fill it in.") from None
    except OSError as error:
        raise SettingsError(f"{path} can't be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not TOML: {error}.") from None
    try:
        cluster = _build(Cluster, values.pop("cluster", {}), "cluster.")
        settings = _build(Settings, {**values, "cluster": cluster}, "")
        check(settings)
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from None
    return settings


def _build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    """The dataclass of a table, with its keys and types checked."""
    if not isinstance(values, dict):
        raise SettingsError(f"{prefix.removesuffix('.')} = {values!r} is no table; write it as [{prefix[:-1]}].")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            raise SettingsError(
                f"{prefix}{key} is no setting; "
                + (f"did you mean {near[0]}?" if near else f"there are {', '.join(fields)}.")
            )
        expected = fields[key].type if isinstance(fields[key].type, type) else type(fields[key].default_factory())
        if type(value) is not expected:
            raise SettingsError(
                f"{prefix}{key} = {value!r} is a {type(value).__name__}; expected a {expected.__name__}."
            )
    required = [
        field.name for field in fields.values() if field.default is field.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in values]
    if missing:
        raise SettingsError(f"{', '.join(prefix + name for name in missing)} must be set.")
    return cls(**values)


def check(settings: Settings) -> None:
    """Raises SettingsError if a value cannot work."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name != "cluster" and "YOUR_" in str(value):
            raise SettingsError(f"{field.name} is still {value!r}; put your own value in its place.")
    _check_name(settings)
    if not (ROOT / settings.config.partition(":")[0]).is_file():
        raise SettingsError(
            f"config = {settings.config!r} is no file of this checkout, which is what the image has; write it from "
            f"{ROOT} on, as in configs/base_3b.py."
        )
    if not re.fullmatch(r"[-\w./:@]+", settings.image):
        raise SettingsError(f"image = {settings.image!r} must be REGISTRY/NAME:TAG, without spaces.")
    if not re.fullmatch(r"gs://[a-z0-9][-_.a-z0-9]+(/.*)?", settings.bucket):
        raise SettingsError(
            f"bucket = {settings.bucket!r} must start with gs:// and a bucket's name: the disk of a pod is lost with "
            "it, and the run goes on from its checkpoints."
        )
    if settings.data_bucket and not re.fullmatch(r"[a-z0-9][-_.a-z0-9]+", settings.data_bucket):
        raise SettingsError(
            f"data_bucket = {settings.data_bucket!r} must be a bucket's name alone, without gs:// and folders; its "
            f"folders are then found in {DATA}."
        )
    for name, least in [("slices", 1), ("max_restarts", 0), ("grace_seconds", 1)]:
        if not least <= getattr(settings, name) < 2**31:
            raise SettingsError(f"{name} = {getattr(settings, name)} must be at least {least}, and below 2^31.")
    if settings.capacity not in ("on-demand", "spot") and not re.fullmatch(
        r"reservation:([-\w.]+/)*[a-z][-a-z0-9]{0,61}[a-z0-9]", settings.capacity
    ):
        raise SettingsError(f'capacity = {settings.capacity!r} must be "on-demand", "spot" or "reservation:NAME".')
    _check_kubernetes(settings)
    if any(type(argument) is not str for argument in settings.train_args):
        raise SettingsError(f"train_args = {settings.train_args!r} must be a list of strings.")
    for argument in settings.train_args:
        # the last of a flag counts
        if twice := re.match(r"--?(config|workdir)(=|$)", argument):
            setting = {"config": "config", "workdir": "bucket and name"}[twice[1]]
            raise SettingsError(f"train_args has {argument!r}, which {setting} says; set that, and leave this out.")
    if settings.slices > 1 and settings.slice.hosts == 1:
        raise SettingsError(
            f"slices = {settings.slices}, but a {settings.accelerator} slice of topology {settings.topology} is a "
            "single host, and GKE joins only slices of several; take a larger topology, or slices = 1."
        )
    settings.slice  # noqa: B018 raises if there is none


def _check_kubernetes(settings: Settings) -> None:
    """Names that Kubernetes would refuse, when the manifest is applied or only when the pods are made."""
    for name in ("service_account", "queue"):
        value = getattr(settings, name)
        if value and not re.fullmatch(r"[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?", value):
            raise SettingsError(f"{name} = {value!r} must be lower-case letters, digits, hyphens and dots.")
    for key, value in settings.env.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", key):
            raise SettingsError(f"env.{key!r} is no name of a variable; it must be letters, digits and underscores.")
        if type(value) is not str:
            raise SettingsError(f"env.{key} = {value!r} is a {type(value).__name__}; write it in quotes.")


def _check_name(settings: Settings) -> None:
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", settings.name):
        raise SettingsError(
            f"name = {settings.name!r} must be lower-case letters, digits and hyphens, start with a letter and not end "
            "with a hyphen."
        )
    # NAME-slice-SLICE-HOST-xxxxx
    longest_pod = f"{settings.name}-slice-{settings.slices - 1}-{settings.slice.hosts - 1}-xxxxx"
    if len(longest_pod) > LONGEST_NAME:
        over = len(longest_pod) - LONGEST_NAME
        raise SettingsError(f"name = {settings.name!r} makes pod names too long; shorten it by {over} characters.")


def manifest(settings: Settings) -> dict[str, Any]:
    """The JobSet: one Job a slice, one pod a host.

    If any host fails, all of them start again, from the last checkpoint. A preemption, and a host that saved after
    SIGTERM, fail their Job by its podFailurePolicy; the JobSet then restarts without counting it to max_restarts.
    """
    labels = {"kueue.x-k8s.io/queue-name": settings.queue} if settings.queue else {}
    hosts = settings.slice.hosts
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # a host alone cannot go on: the JobSet restarts them all
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [EXIT_PREEMPTED]},
                },
            ]
        },
        "template": {
            # has GKE put Cloud Storage FUSE beside the training
            **({"metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}}} if settings.data_bucket else {}),
            "spec": _pod(settings),
        },
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": settings.name,
            **({"labels": labels} if labels else {}),
            # all pods of a slice on one node pool, and no two slices on the same
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            # the headless service through which jax.distributed finds the other hosts; GKE sets TPU_WORKER_HOSTNAMES
            # from it, and MEGASCALE_* where there are several slices
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": settings.max_restarts,
                "rules": [
                    {
                        "name": "preempted",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [{"name": "slice", "replicas": settings.slices, "template": {"spec": job}}],
        },
    }


def _pod(settings: Settings) -> dict[str, Any]:
    tpu = settings.slice
    selector = {
        "cloud.google.com/gke-tpu-accelerator": tpu.generation.label,
        "cloud.google.com/gke-tpu-topology": tpu.topology,
    }
    tolerations = [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}]
    if settings.capacity == "spot":
        selector["cloud.google.com/gke-spot"] = "true"
        tolerations.append({"key": "cloud.google.com/gke-spot", "operator": "Exists", "effect": "NoSchedule"})
    elif settings.capacity.startswith("reservation:"):
        # a shared one is named with its project; a label has room for the name alone
        selector["cloud.google.com/reservation-name"] = settings.capacity.removeprefix("reservation:").split("/")[-1]
    container = {
        "name": CONTAINER,
        "image": settings.image,
        "imagePullPolicy": "Always",  # or a node would go on with what the tag named before
        "command": settings.command,
        "resources": {
            "requests": {"google.com/tpu": str(tpu.chips_per_host)},
            "limits": {"google.com/tpu": str(tpu.chips_per_host)},
        },
        # data workers hand batches over in shared memory, of which a container has only 64 MB by itself
        "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],
    }
    if settings.env:
        container["env"] = [{"name": name, "value": value} for name, value in settings.env.items()]
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": settings.grace_seconds,
        "nodeSelector": selector,
        "tolerations": tolerations,
        "containers": [container],
        "volumes": [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}],
    }
    if settings.service_account:
        pod["serviceAccountName"] = settings.service_account
    if settings.data_bucket:
        container["volumeMounts"].append({"name": "data", "mountPath": DATA, "readOnly": True})
        pod["volumes"].append({"name": "data", "csi": _data_volume(settings)})
    if settings.host_network:
        pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    return pod


def _data_volume(settings: Settings) -> dict[str, Any]:
    # implicit-dirs: folders of which a bucket knows only that files' names begin with them
    attributes = {"bucketName": settings.data_bucket, "mountOptions": "implicit-dirs"}
    if settings.host_network:
        attributes["hostNetworkPodKSA"] = "true"  # read as service_account; from GKE 1.33.3 on
    return {"driver": "gcsfuse.csi.storage.gke.io", "readOnly": True, "volumeAttributes": attributes}


def manifest_text(settings: Settings) -> str:
    """The manifest as YAML."""
    return yaml.safe_dump(manifest(settings), sort_keys=False, width=120)


def xpk_command(settings: Settings) -> list[str]:
    """`xpk workload create` for the same run. xpk writes a JobSet of its own, which counts preemptions as failures."""
    _check_cluster(settings)
    for name in ("data_bucket", "service_account", "queue", "host_network"):
        if getattr(settings, name):
            raise SettingsError(
                f"{name} = {getattr(settings, name)!r} can't be told to xpk; use apply, or leave it out."
            )
    _check_length("workload", settings.name)
    if settings.accelerator == "v5e" and settings.slice.hosts == 1:
        raise SettingsError(
            f"topology = {settings.topology!r} of v5e is unknown to xpk, whose smallest is 2x4; take that, or apply."
        )
    capacity = {"on-demand": ["--on-demand"], "spot": ["--spot"]}.get(
        settings.capacity, [f"--reservation={settings.capacity.removeprefix('reservation:')}"]
    )
    words = ["xpk", "workload", "create"]
    words += [f"--project={settings.cluster.project}", f"--zone={settings.cluster.zone}"]
    words += [f"--cluster={settings.cluster.name}", f"--workload={settings.name}"]
    # the topology and not the count: 256 chips of v4 can be 4x8x8 or 4x4x16
    words += [f"--tpu-type={settings.slice.generation.xpk}-{settings.topology}", f"--num-slices={settings.slices}"]
    words += [f"--docker-image={settings.image}", *capacity, f"--max-restarts={settings.max_restarts}"]
    # by itself xpk restarts only after 42, 127 and more
    words += [f"--restart-on-exit-codes={','.join(map(str, EXIT_AGAIN))}"]
    words += [f"--termination-grace-period-seconds={settings.grace_seconds}"]
    words += [f"--env={name}={value}" for name, value in settings.env.items()]
    return [*words, f"--command=exec {shlex.join(settings.command)}"]


def nodepool_commands(settings: Settings) -> list[list[str]]:
    """`gcloud container node-pools create` for each slice."""
    _check_cluster(settings)
    _check_length("node pool", f"{settings.name}-{settings.slices - 1}")
    tpu, cluster = settings.slice, settings.cluster
    capacity = {"on-demand": [], "spot": ["--spot"]}.get(
        settings.capacity,
        ["--reservation-affinity=specific", f"--reservation={settings.capacity.removeprefix('reservation:')}"],
    )
    # GKE refuses a topology for a single host, and labels its node with one all the same
    topology = [f"--tpu-topology={tpu.topology}"] if tpu.hosts > 1 else []
    return [
        ["gcloud", "container", "node-pools", "create", f"{settings.name}-{index}", *_in_cluster(cluster)]
        + [f"--node-locations={cluster.zone}", f"--machine-type={tpu.machine}", *topology]
        + [f"--num-nodes={tpu.hosts}", "--scopes=cloud-platform", *capacity]
        for index in range(settings.slices)
    ]


def list_command(settings: Settings) -> list[str]:
    """`gcloud container node-pools list`, by name and status."""
    where = _in_cluster(settings.cluster)
    return ["gcloud", "container", "node-pools", "list", *where, "--format=value(name,status)"]


def missing_nodepools(settings: Settings) -> list[list[str]]:
    """`nodepool_commands` without the node pools that are there, so that what failed half way can be run again.

    Raises:
      SettingsError: for a node pool that is there and can't be used.
      subprocess.CalledProcessError: if gcloud can't list them.
    """
    where = _in_cluster(settings.cluster)
    listed = subprocess.run(list_command(settings), stdout=subprocess.PIPE, text=True, check=True).stdout
    states = dict(line.split("\t") for line in listed.splitlines())
    missing = []
    for create in nodepool_commands(settings):
        name = create[4]
        state = states.get(name)
        if state is None:
            missing.append(create)
        elif state in ("PROVISIONING", "RUNNING", "RECONCILING"):
            print(f"{name} is there already: {state}")
        else:
            delete = shlex.join(["gcloud", "container", "node-pools", "delete", name, *where])
            raise SettingsError(f"the node pool {name} is there, but its state is {state}; delete it first: {delete}")
    return missing


def _in_cluster(cluster: Cluster) -> list[str]:
    location = cluster.zone.rsplit("-", 1)[0]
    return [f"--project={cluster.project}", f"--cluster={cluster.name}", f"--location={location}"]


def _check_cluster(settings: Settings) -> None:
    for name, value in dataclasses.asdict(settings.cluster).items():
        if not value or "YOUR_" in value:
            raise SettingsError(f"cluster.{name} = {value!r} must be set for this; it is the {name} of your cluster.")
        if not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z0-9]+" if name == "zone" else r"[-a-z0-9.:]+", value):
            expected = "a zone, as us-central2-b" if name == "zone" else "lower-case letters, digits and hyphens"
            raise SettingsError(f"cluster.{name} = {value!r} must be {expected}.")


def _check_length(what: str, name: str) -> None:
    if len(name) > LONGEST_POOL:
        raise SettingsError(
            f"{name!r} is too long for a {what}: {len(name)} characters of {LONGEST_POOL}; shorten name by "
            f"{len(name) - LONGEST_POOL}."
        )


def image_commands(settings: Settings) -> list[list[str]]:
    """docker build and push."""
    dockerfile = HERE / "Dockerfile"
    return [
        ["docker", "build", "--platform=linux/amd64", f"--tag={settings.image}", f"--file={dockerfile}", str(ROOT)],
        ["docker", "push", settings.image],
    ]


def _kubectl(*words: str) -> Callable[[Settings], list[list[str]]]:
    return lambda settings: [["kubectl", *(word.format(name=settings.name) for word in words)]]


ACTIONS: dict[str, Callable[[Settings], list[list[str]]]] = {
    "image": image_commands,
    "nodepools": nodepool_commands,
    "show": lambda settings: [],
    "apply": _kubectl("apply", "--filename=-"),
    "xpk": lambda settings: [xpk_command(settings)],
    "logs": _kubectl("logs", "--follow", "--tail=100", f"--selector={FIRST_HOST}"),
    "delete": _kubectl("delete", "jobset", "{name}"),
}


def main(argv: list[str]) -> int:
    """Runs one action; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument("--settings", type=pathlib.Path, default=HERE / "settings.toml", help="the settings file")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and do nothing")
    arguments = parser.parse_args(argv)
    try:
        settings = load_settings(arguments.settings)
        commands = ACTIONS[arguments.action](settings)
        text = manifest_text(settings) if arguments.action in ("show", "apply") else None
        if text and (arguments.dry_run or arguments.action == "show"):
            print(text, end="")
        if arguments.dry_run:
            if arguments.action == "nodepools":
                print(f"{shlex.join(list_command(settings))}  # then those that are not there yet:")
            for command in commands:
                print(f"# {shlex.join(command)}" if text else shlex.join(command))
            return 0
        if arguments.action == "nodepools":
            commands = missing_nodepools(settings)
        for command in commands:
            subprocess.run(command, input=text, text=True, check=True)
    except SettingsError as error:
        print(f"SettingsError: {error}", file=sys.stderr)
        return 1
    except FileNotFoundError as error:
        print(f"{error.filename} is not installed here; launch/README.md says where it is from.", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
