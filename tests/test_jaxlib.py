"""Two ways in which jaxlib 0.10.2 is broken on CPU; `setup.py` excludes it, these keep it out.

Each program runs in a process of its own, on one device: the second one takes its process down.
"""

import subprocess
import sys

import pytest

# jax#39103: a batched matrix-vector product fused with the sum after it reads beyond its tile once
# there are more rows than fit in one; the last rows are wrong, and nothing says so.
WRONG_SUMS = """
import jax, jax.numpy as jnp, numpy as np

rows = 32_769
x = np.zeros((rows, 3), np.float32)
x[:, 0] = np.arange(rows)
energy = jax.jit(jax.vmap(lambda row: jnp.sum(jnp.square(jnp.eye(3) @ row))))
np.testing.assert_allclose(np.asarray(energy(jnp.asarray(x))), np.sum(np.square(x), axis=1), rtol=1e-6)
"""

# jax#40412, jax#39257: multiply and sum over one axis of rank-7 arrays with an axis of size 1 ends in
# a segmentation fault on a worker thread, or never ends.
CRASH = """
import jax, jax.numpy as jnp, numpy as np

a, b = np.random.default_rng(0).normal(size=(2, 3, 1, 2, 2, 8, 8, 8)).astype(np.float32)
for axis in range(a.ndim):
    got = jax.jit(lambda a, b: jnp.sum(a * b, axis=axis))(a, b)
    np.testing.assert_allclose(np.asarray(got), np.sum(a * b, axis=axis), rtol=1e-4, atol=1e-4)
"""


@pytest.mark.parametrize("program", [WRONG_SUMS, CRASH], ids=["wrong_sums", "crash"])
def test_jaxlib_reduces_right_on_cpu(program, as_users):
    done = subprocess.run(
        [sys.executable, "-c", program], env=as_users, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, (
        f"this jaxlib computes wrong sums or crashes (exit {done.returncode}); "
        f"exclude its version in setup.py\n{done.stderr[-2000:]}"
    )
