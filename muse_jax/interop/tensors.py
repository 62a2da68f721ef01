"""Tensors in files, read slice by slice: the safetensors and torch files that weights are published in.

A file is opened by its header alone; `tensor[index]` reads what the index asks for and nothing else.
No pickle is executed: safetensors has none, and torch files go through torch's `weights_only` reader.
"""

import json
import math
import re
import zipfile
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from etils import epath

_DTYPES = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16},
    **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_},
}
CODES = {np.dtype(dtype).name: code for code, dtype in _DTYPES.items()}
FLOATS = ("float64", "float32", "float16", "bfloat16")
_MAX_HEADER = 100 * 2**20  # of safetensors' own readers too
_RUN = 2**20  # on remote storage, shorter pieces than this are read together with what lies between
# torch's weights_only reader could be made to run code before this version (CVE-2025-32434, CVE-2026-24747).
_SAFE_TORCH = (2, 10)


class WeightsError(ValueError):
    """A file that is not what it should be; the message names the tensor, what was found and expected."""


@runtime_checkable
class Tensor(Protocol):
    """A tensor that has not been read yet."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        """Reads the part that NumPy's basic indexing with slices and integers names."""


class SafeTensor:
    """One tensor of a safetensors file.

    Attributes:
      name, shape, dtype: of the tensor.
      fingerprint: what `training.trees.fingerprint` of it should be, or None where that is not known.
    """

    def __init__(self, path: epath.Path, name: str, shape: tuple[int, ...], dtype: np.dtype, offset: int):
        self.path, self.name, self.shape, self.dtype, self.offset = path, name, shape, dtype, offset
        self.ndim = len(shape)
        self.fingerprint: int | None = None

    def __getitem__(self, index: Any) -> np.ndarray:
        if not math.prod(self.shape):
            return np.zeros(self.shape, self.dtype)[index]
        if "://" not in str(self.path):
            return np.array(np.memmap(self.path, self.dtype, "r", self.offset, self.shape)[index])
        return self._remote(index if isinstance(index, tuple) else (index,))

    def _remote(self, index: tuple[Any, ...]) -> np.ndarray:
        """Reads ranges of bytes, each as long as the rows that are wanted side by side."""
        if not self.ndim:
            return np.asarray(self._range(0, 1).reshape(()))
        first, *rest = (*index, *(slice(None),) * (self.ndim - len(index)))
        if isinstance(first, int | np.integer):
            return np.asarray(self._rows(int(first), int(first) + 1)[(0, *rest)])
        start, stop, step = first.indices(self.shape[0])
        inner = math.prod(self.shape[1:]) * self.dtype.itemsize
        if step != 1 or inner < _RUN or self.ndim < 2:
            return self._rows(start, max(start, stop))[(slice(None, None, step), *rest)]
        # Stacked layers: of each, only the part that is wanted.
        parts = [self._layer(i)._remote(tuple(rest)) for i in range(start, stop)]
        return np.stack(parts) if parts else np.zeros(self.shape, self.dtype)[index]

    def _layer(self, i: int) -> "SafeTensor":
        inner = math.prod(self.shape[1:]) * self.dtype.itemsize
        return SafeTensor(self.path, self.name, self.shape[1:], self.dtype, self.offset + i * inner)

    def _rows(self, start: int, stop: int) -> np.ndarray:
        inner = math.prod(self.shape[1:])
        return self._range(start * inner, (stop - start) * inner).reshape(stop - start, *self.shape[1:])

    def _range(self, start: int, count: int) -> np.ndarray:
        with self.path.open("rb") as file:
            file.seek(self.offset + start * self.dtype.itemsize)
            return np.frombuffer(file.read(count * self.dtype.itemsize), self.dtype)


def open_safetensors(path: Any) -> dict[str, SafeTensor]:
    """The tensors of a safetensors file, of which the header has been read and checked against the file's size.

    Raises:
      WeightsError: if it is no safetensors file, or a damaged or truncated one.
    """
    path = epath.Path(path)
    size = path.stat().length
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise WeightsError(
                f"{path} is no safetensors file or a truncated one: it has {size} bytes and a header of {length}."
            )
        try:
            header = json.loads(file.read(length).decode("utf-8"))
            header.pop("__metadata__", None)
            entries = {name: _entry(name, value) for name, value in header.items()}
        except WeightsError as error:
            raise WeightsError(f"{path}: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise WeightsError(f"{path} is no safetensors file: its header can't be read ({error}).") from error
    _check_extents(path, {name: extent for name, (_, _, extent) in entries.items()}, size - 8 - length)
    return {
        name: SafeTensor(path, name, shape, dtype, 8 + length + extent[0])
        for name, (shape, dtype, extent) in entries.items()
    }


def _entry(name: str, value: Mapping[str, Any]) -> tuple[tuple[int, ...], np.dtype, tuple[int, int]]:
    if value["dtype"] not in _DTYPES:
        raise WeightsError(f"{name} has the dtype {value['dtype']!r}, expected one of {', '.join(_DTYPES)}.")
    dtype = np.dtype(_DTYPES[value["dtype"]])
    numbers = [*value["shape"], *value["data_offsets"]]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{name} has the shape {value['shape']} and the offsets {value['data_offsets']}")
    shape, (begin, end) = tuple(value["shape"]), value["data_offsets"]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has {end - begin} bytes, expected {math.prod(shape) * dtype.itemsize} for {shape}")
    return shape, dtype, (begin, end)


def _check_extents(path: epath.Path, extents: Mapping[str, tuple[int, int]], size: int) -> None:
    """Tensors lie side by side, without overlap, to the file's end."""
    at = 0
    for name, (begin, end) in sorted(extents.items(), key=lambda item: item[1]):
        if end > size:
            raise WeightsError(
                f"{path} is truncated: {name} is at bytes {begin} to {end} of its data, and there are {size}."
            )
        if begin != at:
            raise WeightsError(f"{path} is damaged: {name} begins at byte {begin} of its data; expected {at}.")
        at = end
    if at != size:
        raise WeightsError(f"{path} is damaged: its tensors take {at} bytes, and it holds {size}.")


class _TorchTensor:
    """A tensor that torch has mapped into memory."""

    def __init__(self, name: str, value: Any):
        self.name, self._value = name, value
        self.shape, self.ndim = tuple(value.shape), value.dim()
        code = str(value.dtype).removeprefix("torch.")
        self.dtype = np.dtype(ml_dtypes.bfloat16 if code == "bfloat16" else code)

    def __getitem__(self, index: Any) -> np.ndarray:
        import torch

        part = self._value[index].detach().contiguous()
        if part.dtype == torch.bfloat16:
            return part.view(torch.uint16).numpy().view(ml_dtypes.bfloat16).copy()
        return part.numpy().copy()


def open_torch(path: Any) -> dict[str, _TorchTensor]:
    """The tensors of a torch file (a state dict), through torch's reader that executes no pickle.

    Raises:
      WeightsError: if torch is missing or too old, or the file is damaged or holds anything but tensors.
    """
    try:
        import torch
    except ImportError as error:
        raise WeightsError(
            f"{path} is a torch file, and torch is not installed. Install it (pip install torch, 2.10 or newer), "
            "or bring a safetensors file, which needs nothing."
        ) from error
    version = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    if version < _SAFE_TORCH:
        raise WeightsError(f"torch {torch.__version__} can't read {path} safely; install 2.10 or newer.")
    try:
        # Only zip files can be mapped; older ones are read whole.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        said = str(error).strip().split("\n")[0][:300]
        reason = type(error).__name__ if not said or "weights_only" in str(error) else said  # that advises to trust it
        raise WeightsError(
            f"{path} is damaged, or holds more than tensors, and was not opened, since that could run code; bring the "
            f"weights as safetensors, or as a state dict ({reason})."
        ) from error
    if not isinstance(state, Mapping):
        raise WeightsError(f"{path} holds a {type(state).__name__}; expected a state dict, names with tensors.")
    for name, value in state.items():
        if not isinstance(name, str):
            raise WeightsError(f"{path} has a tensor under {name!r}; expected a name.")
        if not isinstance(value, torch.Tensor):
            raise WeightsError(f"{path}: {name} is a {type(value).__name__}; expected a tensor.")
        if value.layout is not torch.strided or value.is_quantized or value.is_nested:
            raise WeightsError(f"{path}: {name} is a sparse, quantized or nested tensor; expected a plain one.")
    try:
        return {name: _TorchTensor(name, value) for name, value in state.items()}
    except TypeError as error:
        raise WeightsError(f"{path} has a tensor of a dtype that NumPy lacks: {error}.") from error


def open_file(path: Any) -> dict[str, Any]:
    """The tensors of a safetensors or torch file, told apart by its name.

    Raises:
      WeightsError: see `open_safetensors` and `open_torch`; or if the name ends otherwise.
    """
    path = epath.Path(path)
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    if path.suffix in (".bin", ".pth", ".pt"):
        return open_torch(path)
    raise WeightsError(f"{path}: expected a file named *.safetensors, *.bin, *.pth or *.pt.")


def check(tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Refuses tensors that are not exactly those of `shapes`, or not of floats.

    Raises:
      WeightsError: naming the first tensor that is missing, unknown, of another shape or no float.
    """
    missing, unknown = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    if missing:
        found = f"; it has {unknown[0]} {tensors[unknown[0]].shape}, which is not of this model" if unknown else ""
        more = f" and {len(missing) - 1} others" if missing[1:] else ""
        raise WeightsError(
            f"{where} lacks the tensor {missing[0]}{more}; expected it with shape {shapes[missing[0]]}{found}."
        )
    if unknown:
        more = f" and {len(unknown) - 1} others" if unknown[1:] else ""
        raise WeightsError(
            f"{where} has the tensor {unknown[0]}{more}, of shape {tensors[unknown[0]].shape}; "
            "expected none of this name: it is of another model."
        )
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise WeightsError(f"{where}: {name} has the shape {tuple(tensors[name].shape)}; expected {shape}.")
        if tensors[name].dtype.name not in FLOATS:
            raise WeightsError(
                f"{where}: {name} has the dtype {tensors[name].dtype.name}; expected {', '.join(FLOATS)}."
            )
