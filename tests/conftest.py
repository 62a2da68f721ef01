"""Every test sees 8 CPU devices, and a warning is an error (see pyproject.toml for the exceptions)."""

import fcntl
import gc
import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

# Before anything imports jax: the number of devices is fixed when its backend starts. Child
# processes inherit the environment, so commands under test run on the same devices and find this
# checkout whatever is installed.
os.environ["JAX_PLATFORMS"] = "cpu"  # and leave an accelerator that the machine may have alone
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Compiling is most of what the tests do; XLA's costly optimizations change no meaning.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# Workers already take all cores: splitting a program into parts that are compiled at once is a tenth more work.
os.environ["XLA_FLAGS"] = "--xla_cpu_parallel_codegen_split_count=1"
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    # which knows the older way to compile a fusion, twice as fast
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "1"  # of the calls behind an operation programs name the last alone
# What a test compiles, commands under test included, the next has ready: within this run, and this worker alone,
# since nothing locks the folder.
_compiled = tempfile.TemporaryDirectory(prefix="muse_jax-compiled-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
os.environ["MPLBACKEND"] = "Agg"
os.environ["MUSE_JAX_NO_REEXEC"] = "1"  # muse_jax/process.py: a test's process is pytest's

# jax makes many objects while it traces, and few of them are circles: looking for those less often takes a tenth off.
gc.set_threshold(200_000, 20, 50)

ROOT = pathlib.Path(__file__).resolve().parent.parent
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
)
sys.path.insert(0, str(ROOT / "tests"))  # gcs.py

import pytest  # noqa: E402


def pytest_configure(config):
    """Files go to pytest-xdist's workers in the order below, and not by their number of tests."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """The README's commands first: one after another they take longest, and the others' work fits beside them."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


@pytest.fixture(scope="session", autouse=True)
def _eight_devices():
    """The tests of sharding mean nothing on one device, so make sure of it."""
    import jax

    assert jax.device_count() == 8, "jax was started before tests/conftest.py could ask for 8 CPU devices"


@pytest.fixture
def root() -> pathlib.Path:
    """The checkout: configs/, README.md and the package."""
    return ROOT


@pytest.fixture(scope="session")
def one_device() -> dict[str, str]:
    """The environment of a command on a user's machine, where there is one device; a third less to compile, too."""
    return {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}


@pytest.fixture(scope="session")
def as_users() -> dict[str, str]:
    """The environment of a command for which XLA's optimizations matter: one device, and all of them."""
    ours = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_NUM_CPU_DEVICES", "XLA_FLAGS")
    return {name: value for name, value in os.environ.items() if name not in ours}


@pytest.fixture(scope="session")
def tiny_quickstart(tmp_path_factory, one_device) -> tuple[pathlib.Path, str]:
    """The workdir of a quickstart on the tiny variant, and what it said. Read it only.

    Run as the README says: where the user stands, into runs/quickstart. Of several workers of pytest-xdist the
    first that wants it runs it, and each has a copy.
    """
    shared = tmp_path_factory.getbasetemp()
    shared = (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "quickstart"
    here, said = shared / "user", shared / "said"
    here.mkdir(parents=True, exist_ok=True)
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not said.exists():
            command = [sys.executable, "-m", "muse_jax.quickstart", "--variant=tiny"]
            settings = {"capture_output": True, "text": True, "timeout": 600, "check": False}
            done = subprocess.run(command, cwd=here, env=one_device, **settings)
            assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
            said.write_text(done.stdout, encoding="utf-8")
    own = tmp_path_factory.mktemp("user") / "user"
    shutil.copytree(here, own)
    return own / "runs/quickstart", said.read_text(encoding="utf-8")
