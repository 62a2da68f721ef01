"""LPIPS from torchvision's VGG16 and the linear heads of the `lpips` package, or from both in one file.

A folder's files are read together, and names of either origin are known: `features.0.weight` of
torchvision, `net.slice1.0.weight` of an `lpips.LPIPS` that was saved whole, `lin0.model.1.weight` of
the heads. VGG16's classifier is not read.
"""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from muse_jax.interop import folder, tensors
from muse_jax.interop.tensors import Tensor, WeightsError
from muse_jax.models import lpips

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
# In a whole LPIPS the heads have two names, and the constants of its normalisation are saved too.
_UNUSED = re.compile(r"classifier\..*|lins\.\d\.model\.1\.weight|scaling_layer\.(shift|scale)")
_CONVOLUTION = re.compile(r"(?:features|net\.slice[1-5])\.(\d+)\.(weight|bias)")


def convert(path: str) -> folder.Converted:
    """LPIPS' parameters from a folder with the two files, a file with all, or files joined by commas.

    Raises:
      WeightsError: if a tensor is missing, unknown, twice there, or of another shape.
    """
    found: dict[str, Tensor] = {}
    for file in _files(path):
        for name, tensor in tensors.open_file(file).items():
            if _UNUSED.fullmatch(name):
                continue
            known = _canonical(name)
            if known in found:
                raise WeightsError(f"{file} has {name}, which another file of {path} has too; name one of them.")
            found[known] = tensor
    origins = _origins()
    tensors.check(found, dict(origins.values()), path)
    shapes = lpips.parameter_shapes()
    leaves = [
        folder.Leaf(name, shapes[name], found[origin].dtype, _blocks(name, found[origin], path), narrow=False)
        for name, (origin, _) in origins.items()
    ]
    return folder.Converted("lpips", leaves, {"network": "vgg16"})


def _files(path: str) -> list[epath.Path]:
    if not epath.Path(path).is_dir():
        files = [epath.Path(part.strip()) for part in path.split(",")]
    else:
        files = sorted(file for file in epath.Path(path).iterdir() if file.suffix in _SUFFIXES)
    if not files:
        raise WeightsError(f"{path} has no file named {', '.join('*' + suffix for suffix in _SUFFIXES)}.")
    for file in files:
        if not file.exists():
            raise WeightsError(f"there is no {file}; name the folder with VGG16's file and that of the heads.")
    return files


def _canonical(name: str) -> str:
    """torchvision's name of a convolution, whoever saved it."""
    match = _CONVOLUTION.fullmatch(name)
    return f"features.{match[1]}.{match[2]}" if match else name


def _origins() -> dict[str, tuple[str, tuple[int, ...]]]:
    """{our name: (its name, its shape)}. VGG16 numbers every layer, the ReLUs and poolings too."""
    origins, number, channels = {}, 0, 3
    for stage, widths in enumerate(lpips.STAGES, start=1):
        for i, width in enumerate(widths, start=1):
            ours = f"features/conv{stage}_{i}"
            origins[f"{ours}/kernel"] = (f"features.{number}.weight", (width, channels, 3, 3))
            origins[f"{ours}/bias"] = (f"features.{number}.bias", (width,))
            number, channels = number + 2, width
        number += 1
        origins[f"linear/relu{stage}_{len(widths)}"] = (f"lin{stage - 1}.model.1.weight", (1, channels, 1, 1))
    return origins


def _blocks(name: str, tensor: Tensor, path: str) -> Any:
    def blocks() -> Iterator[tuple[str, np.ndarray]]:
        value = tensor[:]
        if name.startswith("linear/"):
            if (value < 0).any():
                raise WeightsError(f"{path}: {tensor.name} has the value {value.min()}; expected none below 0.")
            yield tensor.name, value.reshape(-1)
        else:
            yield tensor.name, value.transpose(2, 3, 1, 0) if name.endswith("kernel") else value

    return blocks
