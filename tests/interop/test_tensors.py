"""Files that are damaged, or made to do harm."""

import json
import pathlib
import pickle
import warnings

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from muse_jax.interop import tensors
from muse_jax.interop.tensors import WeightsError

VALUES = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.arange(5, dtype=np.float16),
    "c": np.arange(6, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(2, 3),
    "d": np.array(7, np.int64),
}


def test_reads_what_safetensors_writes(tmp_path):
    save_file(VALUES, tmp_path / "x.safetensors")
    read = tensors.open_file(tmp_path / "x.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in read.items()} == {n: (v.shape, v.dtype) for n, v in VALUES.items()}
    for name, value in VALUES.items():
        np.testing.assert_array_equal(read[name][()], value)
        np.testing.assert_array_equal(read[name]._remote(()), value)
    np.testing.assert_array_equal(read["a"][1:, ::2], VALUES["a"][1:, ::2])


def write(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(shape, offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        ({"a": entry([2**60], [0, 2**62])}, 16, "truncated: a is at bytes 0 to 4611686018427387904 .* there are 16"),
        ({"a": entry([4], [0, 16]), "b": entry([4], [8, 24])}, 24, "b begins at byte 8 of its data; expected 16"),
        ({"a": entry([4], [0, 16])}, 99, "its tensors take 16 bytes, and it holds 99"),
        ({"a": entry([4], [0, 12])}, 12, r"a has 12 bytes, expected 16 for \(4,\)"),
        ({"a": entry([-4], [0, 16])}, 16, "a has the shape"),
        ({"a": entry([True, 4], [0, 16])}, 16, "a has the shape"),
        ({"a": entry([4], [0, 16], "F4")}, 16, "^[^ ]*x.safetensors: a has the dtype 'F4', expected one of F64"),
        ({"a": {"shape": [4]}}, 16, "header can't be read"),
        ([1, 2], 16, "header can't be read"),
        (b"\xff\xfe", 16, "header can't be read"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, header, size, message):
    write(tmp_path / "x.safetensors", header, b"\0" * size)
    with pytest.raises(WeightsError, match=message):
        tensors.open_safetensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 40, 300, -1])
def test_truncated_files_are_refused(tmp_path, keep):
    path = tmp_path / "x.safetensors"
    save_file(VALUES, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match="truncated|no safetensors"):
        tensors.open_safetensors(path)


def test_a_huge_header_is_not_read(tmp_path):
    (tmp_path / "x.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(WeightsError, match="10 bytes and a header of 4611686018427387904"):
        tensors.open_safetensors(tmp_path / "x.safetensors")


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_no_pickle_is_executed(tmp_path, torch):
    canary = tmp_path / "canary"
    torch.save({"a": torch.ones(2), "b": Canary(canary)}, tmp_path / "x.bin")
    (tmp_path / "y.pth").write_bytes(pickle.dumps({"a": Canary(canary)}))
    for name in ("x.bin", "y.pth"):
        with pytest.raises(WeightsError, match="holds more than tensors, and was not opened") as refused:
            tensors.open_file(tmp_path / name)
        assert "weights_only" not in str(refused.value), "no advice to open it all the same"
    assert not canary.exists()


def test_torch_files(tmp_path, torch):
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4).to(torch.bfloat16)}
    for legacy in (False, True):  # the older format can't be mapped
        torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
        read = tensors.open_torch(tmp_path / "x.pt")
        np.testing.assert_array_equal(read["a"][:, 1:], [[1, 2], [4, 5]])
        assert read["b"].dtype == read["b"][:].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(read["b"][1:3].astype(np.float32), [1, 2])
    (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:200])
    with pytest.raises(WeightsError, match="damaged"):
        tensors.open_torch(tmp_path / "x.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nested tensors are new
        nested = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])
    for other, message in (
        ([1, 2], "list; expected a state dict"),
        ({"a": 3}, "a is a int; expected a tensor"),
        ({3: torch.ones(1)}, "a tensor under 3; expected a name"),
        ({"a": nested}, "a is a sparse, quantized or nested tensor"),
    ):
        torch.save(other, tmp_path / "x.pt")
        with pytest.raises(WeightsError, match=message):
            tensors.open_torch(tmp_path / "x.pt")


def test_without_torch_or_with_an_old_one(tmp_path, monkeypatch):
    import sys
    import types

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(__version__="2.9.1+cpu"))
    with pytest.raises(WeightsError, match="install 2.10 or newer"):
        tensors.open_torch(tmp_path / "x.pt")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(WeightsError, match="torch is not installed.*or bring a safetensors file"):
        tensors.open_torch(tmp_path / "x.pt")
    with pytest.raises(WeightsError, match="expected a file named"):
        tensors.open_file(tmp_path / "x.ckpt")
