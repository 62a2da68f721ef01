"""Commands start again with malloc settings, once, and only where that helps."""

import os
import shutil
import subprocess
import sys

import pytest

from muse_jax import process

PROGRAM = """
import os, sys
from muse_jax import process
process.reexec_with_malloc_settings()
print(os.getpid(), os.environ.get("MALLOC_ARENA_MAX"), os.environ.get("MALLOC_MMAP_MAX_"), sys.argv[1:])
"""


def _run(tmp_path, module, **environment):
    """Runs PROGRAM as `python -m module --flag`, and returns its pid and what it printed."""
    package = tmp_path / "muse_jax"
    package.mkdir()
    shutil.copy(process.__file__, package)
    (tmp_path / module.replace(".", "/")).with_suffix(".py").write_text(PROGRAM, encoding="utf-8")
    ours = (*process.MALLOC_SETTINGS, process.OFF)
    clean = {name: value for name, value in os.environ.items() if name not in ours}
    child = subprocess.Popen(
        [sys.executable, "-m", module, "--flag=a b"],
        cwd=tmp_path,
        env={**clean, "JAX_PLATFORMS": "cpu", **environment, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    pid, rest = out.strip().split(" ", 1)
    assert int(pid) == child.pid, "signals and supervisors know the process by its id"
    return rest


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")
def test_a_command_starts_again_with_the_settings(tmp_path):
    assert _run(tmp_path, "muse_jax.train") == "1 0 ['--flag=a b']"


@pytest.mark.parametrize(
    ("module", "environment", "expected"),
    [
        ("muse_jax.train", {process.OFF: "1"}, "None None"),
        ("muse_jax.train", {"MALLOC_ARENA_MAX": "2"}, "2 None"),
        ("muse_jax.train", {"JAX_PLATFORMS": "cuda,cpu"}, "None None"),
        ("someone", {}, "None None"),
    ],
    ids=["off", "set_by_the_user", "accelerator", "not_our_command"],
)
def test_otherwise_it_is_left_alone(tmp_path, module, environment, expected):
    assert _run(tmp_path, module, **environment) == f"{expected} ['--flag=a b']"


@pytest.mark.parametrize(
    ("installed", "device", "given", "expected"),
    [(True, "", None, "cpu"), (True, "/dev/null", None, None), (False, "", None, None), (True, "", "cuda", "cuda")],
    ids=["libtpu alone", "with a device", "without libtpu", "asked for"],
)
def test_a_cpu_run_keeps_off_libtpu(tmp_path, installed, device, given, expected):
    if installed:
        (tmp_path / "libtpu").mkdir()
        (tmp_path / "libtpu/__init__.py").write_text("raise SystemExit('touched')")
    program = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("process", {process.__file__!r})
process = importlib.util.module_from_spec(spec)
spec.loader.exec_module(process)
process.TPUS, process.GPUS = ({device!r},), ()
if not {installed}:
    sys.modules["libtpu"] = None
    importlib.util.find_spec = lambda name: None
process.keep_off_libtpu()
print(__import__("os").environ.get("JAX_PLATFORMS"))
"""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"} | {"PYTHONPATH": str(tmp_path)}
    environment |= {"JAX_PLATFORMS": given} if given else {}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(expected)


def test_the_package_keeps_off_libtpu_before_jax_is_imported():
    program = "import sys, muse_jax; print('jax' in sys.modules, 'muse_jax.process' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
