"""LPIPS against a plain NumPy one with random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import save_file

from muse_jax.models import lpips


@pytest.fixture(scope="module")
def tensors():
    rng = np.random.default_rng(0)
    made = {}
    for name, shape in lpips.parameter_shapes().items():
        if name.endswith("kernel"):
            made[name] = rng.standard_normal(shape, np.float32) * np.float32((2 / np.prod(shape[:3])) ** 0.5)
        else:
            made[name] = rng.random(shape, np.float32) * np.float32(0.1)
    return made


@pytest.fixture(scope="module")
def params(tensors):
    return traverse_util.unflatten_dict(tensors, sep="/")


@pytest.fixture(scope="module")
def distance():
    return jax.jit(lambda params, a, b: lpips.LPIPS().apply({"params": params}, a, b))


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(1).uniform(-1, 1, (2, 2, 16, 19, 3)).astype(np.float32)


def reference(tensors, a, b):
    """VGG16 and the weighted distance of one pair, convolution by convolution."""

    def features(x):
        x = (x + np.array([0.030, 0.088, 0.188])) / np.array([0.458, 0.448, 0.450])
        for stage, convolutions in enumerate((2, 2, 3, 3, 3), start=1):
            if stage > 1:
                h, w = x.shape[0] // 2, x.shape[1] // 2
                x = x[: 2 * h, : 2 * w].reshape(h, 2, w, 2, -1).max((1, 3))
            for i in range(1, convolutions + 1):
                kernel = tensors[f"features/conv{stage}_{i}/kernel"]
                padded = np.pad(x, [(1, 1), (1, 1), (0, 0)])
                x = sum(
                    padded[dy : dy + x.shape[0], dx : dx + x.shape[1]] @ kernel[dy, dx]
                    for dy in range(3)
                    for dx in range(3)
                )
                x = np.maximum(x + tensors[f"features/conv{stage}_{i}/bias"], 0)
            yield f"relu{stage}_{convolutions}", x / np.linalg.norm(x, axis=-1, keepdims=True)

    return sum(
        ((p - q) ** 2 @ tensors[f"linear/{name}"]).mean()
        for (name, p), (_, q) in zip(features(a), features(b), strict=True)
    )


def test_equals_the_reference(distance, tensors, params, pictures):
    got = distance(params, *pictures)
    want = [reference(tensors, a, b) for a, b in zip(*pictures, strict=True)]
    assert got.shape == (2,)
    assert min(want) > 0.01
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_is_zero_for_equal_pictures_and_the_same_both_ways(distance, params, pictures):
    first, second = pictures
    np.testing.assert_allclose(distance(params, first, first), 0, atol=1e-12)
    np.testing.assert_allclose(distance(params, first, second), distance(params, second, first), rtol=1e-6)


def test_gradient_is_finite_where_no_feature_is_left():
    """Features that are 0 in all channels, as a ReLU leaves them, must not make the gradient NaN."""
    features = jnp.array([[0.0, 0.0], [3.0, 4.0]]).reshape(1, 1, 2, 2)
    np.testing.assert_allclose(lpips._unit(features).reshape(2, 2), [[0, 0], [0.6, 0.8]], rtol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(lpips._unit(x)[..., 0]))(features).reshape(2, 2)
    np.testing.assert_allclose(gradient, [[0, 0], [0.128, -0.096]], rtol=1e-5)


def test_reads_its_file(tmp_path, tensors, params):
    save_file(tensors, tmp_path / "lpips.safetensors")
    loaded = lpips.load_lpips(tmp_path / "lpips.safetensors")
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    jax.tree.map(lambda x: x.dtype == np.float32 or pytest.fail("not float32"), loaded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features/conv3_2/bias": None}, "lack features/conv3_2/bias"),
        ({"features/conv6_1/bias": np.zeros(3, np.float32)}, "does not: features/conv6_1/bias"),
        ({"linear/relu4_3": np.zeros(256, np.float32)}, r"linear/relu4_3 has shape \(256,\); expected \(512,\)"),
        ({"linear/relu1_2": np.full(64, -1, np.float32)}, "linear/relu1_2 .* negative"),
        ({"features/conv1_1/bias": np.full(64, np.nan, np.float32)}, "features/conv1_1/bias .* not finite"),
    ],
)
def test_refuses_other_files_by_the_tensors_name(tmp_path, monkeypatch, tensors, change, message):
    changed = {name: value for name, value in {**tensors, **change}.items() if value is not None}
    path = tmp_path / "lpips.safetensors"
    path.write_bytes(b"")
    monkeypatch.setattr(lpips, "load", lambda content: changed)
    with pytest.raises(ValueError, match=message):
        lpips.load_lpips(path)


def test_names_the_file_that_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors"):
        lpips.load_lpips(tmp_path / "nowhere.safetensors")


def test_refuses_pictures_it_cannot_see():
    small = jnp.zeros((1, 15, 32, 3))
    with pytest.raises(ValueError, match="at least 16"):
        jax.eval_shape(lpips.LPIPS().init, jax.random.key(0), small, small)
