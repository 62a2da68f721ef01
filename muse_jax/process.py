"""The process that a command runs in: what must be set before it starts.

XLA's CPU backend allocates its buffers with malloc at every call. glibc hands buffers above 128 KiB
back to the kernel when they are freed, so each step of a small model faults in and zeroes the same
pages again. Keeping them makes a train step of the scenes' models take about 0.8 of the time.
glibc reads these settings once, at the start of a process: hence the new start.
"""

import glob
import importlib.util
import os
import platform
import sys
import threading
import time
from collections.abc import Mapping

MALLOC_SETTINGS = {
    "MALLOC_MMAP_MAX_": "0",  # large buffers come from the heap too
    "MALLOC_TRIM_THRESHOLD_": str(2**40),  # which is never given back
    "MALLOC_TOP_PAD_": str(256 * 2**20),  # and grows in large pieces
    "MALLOC_ARENA_MAX": "1",  # one heap, whatever thread asks
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # in pages of 2 MiB where the kernel has them
}
OFF = "MUSE_JAX_NO_REEXEC"  # set to 1: commands leave the process as it was started


TPUS, GPUS = ("/dev/accel*", "/dev/vfio/[0-9]*"), ("/dev/nvidiactl", "/dev/kfd")


def keep_off_libtpu() -> None:
    """Sets JAX_PLATFORMS=cpu where libtpu is installed and there is neither a TPU nor a GPU.

    There jax would load libtpu to find that it has nothing to do. libtpu compiles for TPUs on such a machine
    (muse_jax/compile.py), which needs no TPU backend. Does nothing where JAX_PLATFORMS is set, or jax imported.
    """
    if "JAX_PLATFORMS" in os.environ or "jax" in sys.modules or importlib.util.find_spec("libtpu") is None:
        return
    if not accelerated(os.environ):
        os.environ["JAX_PLATFORMS"] = "cpu"


def reexec_with_malloc_settings() -> None:
    """Starts the running `python -m muse_jax...` again with `MALLOC_SETTINGS`, in the same process id.

    Commands call it first, before jax is imported. It returns, and changes nothing, where it has
    been done, where it would not help (no glibc, an accelerator), where the environment already has
    any of the settings, and where the main program is not one of ours (a test, a notebook).
    """
    if not _is_our_command() or not _helps(os.environ):
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **MALLOC_SETTINGS})


def _is_our_command() -> bool:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec is not None and spec.name.startswith("muse_jax.")


def _helps(environment: Mapping[str, str]) -> bool:
    if environment.get(OFF) == "1" or any(name in environment for name in MALLOC_SETTINGS):
        return False
    if platform.libc_ver()[0] != "glibc":
        return False
    return not accelerated(environment)


def accelerated(environment: Mapping[str, str]) -> bool:
    """Whether jax would find a TPU or a GPU, or is told to use one; starts no backend."""
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms.split(",")[0] != "cpu"
    return any(glob.glob(device) for device in (*TPUS, *GPUS))


def end_with_parent() -> None:
    """Ends this process at once when the one that started it is gone, if that asked for it (muse_jax/lanes.py).

    A run that is killed loses no more than its last steps; one that outlived its parent would keep the workdir
    from whoever starts the parent again.
    """
    parent = int(os.environ.get("MUSE_JAX_PARENT", 0))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    if parent:
        threading.Thread(target=watch, daemon=True, name="muse_jax parent").start()


def quiet() -> None:
    """Keeps what libraries note off the screen, unless --verbosity is given; warnings and errors stay.

    absl turns its level to "info" when it has parsed the flags, and Orbax notes much. Commands call it
    first in their main.
    """
    from absl import flags, logging

    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
