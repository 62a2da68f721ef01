"""LPIPS: the distances of the lpips package, with its heads and a random VGG16 of torchvision."""

import warnings

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from muse_jax.import_weights import import_weights
from muse_jax.interop.tensors import WeightsError
from muse_jax.models import lpips as ours


@pytest.fixture(scope="module")
def original(lpips, torch):
    """The package's LPIPS with its own heads and random convolutions (nothing is downloaded)."""
    with pytest.MonkeyPatch.context() as patch:  # the classifier, which is thrown away, takes long to draw
        for name in ("kaiming_normal_", "kaiming_uniform_", "normal_", "uniform_"):
            patch.setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips calls torchvision in a way that it wants no more
            model = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter.normal_(0, (2 / parameter[0].numel()) ** 0.5 if parameter.dim() == 4 else 0.1)
    return model


@pytest.fixture(scope="module")
def files(original, torch, tmp_path_factory):
    """VGG16 as torchvision's models are saved, and the heads as the package has them."""
    path = tmp_path_factory.mktemp("lpips")
    state = original.state_dict()
    vgg = {f"features.{name.split('.')[2]}.{name.split('.')[3]}": v for name, v in state.items() if "net." in name}
    torch.save({**vgg, "classifier.6.bias": torch.zeros(1000)}, path / "vgg16.pth")
    torch.save(
        {name: value for name, value in state.items() if name.startswith("lin") and "lins" not in name},
        path / "vgg.pth",
    )
    return path


def test_the_names_are_torchvisions(torchvision, torch, files):
    with torch.device("meta"):
        state = torchvision.models.vgg16(weights=None).state_dict()
    saved = torch.load(files / "vgg16.pth", weights_only=True, mmap=True)
    assert {name: tuple(v.shape) for name, v in state.items() if "features" in name} == {
        name: tuple(v.shape) for name, v in saved.items() if "features" in name
    }


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", "whole"])
def test_distances_equal_the_package(tmp_path, original, files, torch, suffix):
    path = files
    if suffix != ".pth":
        path = tmp_path / "in"
        path.mkdir()
        state = (
            original.state_dict()
            if suffix == "whole"
            else {
                name: value for file in files.iterdir() for name, value in torch.load(file, weights_only=True).items()
            }
        )
        save_file({name: np.array(value.numpy()) for name, value in state.items()}, path / "all.safetensors")
    import_weights("lpips", str(path), str(tmp_path / "out"))
    params = ours.load_lpips(tmp_path / "out")
    rng = np.random.default_rng(0)
    a, b = rng.uniform(-1, 1, (2, 2, 32, 38, 3)).astype(np.float32)
    b[1] = a[1] + 0.01 * b[1]  # a pair that is close, too
    got = np.asarray(jax.jit(ours.LPIPS().apply)({"params": params}, a, b))
    with torch.no_grad():
        want = original(*(torch.tensor(x.transpose(0, 3, 1, 2)) for x in (a, b))).numpy().reshape(-1)
    errors = np.abs(got / want - 1)
    print(f"lpips {want} relative errors {errors}")
    assert errors[0] < 1e-5
    # Features of a close pair differ in the third digit and later, so their rounding weighs a thousand times more
    # in the difference; 1.4e-5 was seen.
    assert errors[1] < 1e-4


NAME = "features.5.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({NAME: None}, f"lacks the tensor {NAME}; expected it with shape \\(128, 64, 3, 3\\)"),
        ({NAME: (64, 128, 3, 3)}, f"{NAME} has the shape \\(64, 128, 3, 3\\); expected \\(128, 64, 3, 3\\)"),
        ({"lin2.model.1.weight": None}, "lacks the tensor lin2.model.1.weight; expected it with shape"),
        ({"features.30.weight": (512, 512, 3, 3)}, "has the tensor features.30.weight, of shape"),
    ],
)
def test_others_are_refused_by_name(tmp_path, monkeypatch, change, message):
    tensors = {origin: np.broadcast_to(np.float32(0), shape) for origin, shape in dict(_origins()).items()}
    tensors |= {
        name: None if shape is None else np.broadcast_to(np.float32(0), shape) for name, shape in change.items()
    }
    tensors = {name: value for name, value in tensors.items() if value is not None}
    monkeypatch.setattr("muse_jax.interop.tensors.open_file", lambda _: tensors)
    (tmp_path / "vgg.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError, match=message):
        import_weights("lpips", str(tmp_path), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def _origins():
    from muse_jax.interop import lpips

    return lpips._origins().values()
