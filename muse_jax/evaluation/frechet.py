"""Fréchet distance between sets of pictures, without a network that would have to be downloaded.

The distance of FID (Heusel et al. 2017, section 3) with other features: those of one layer of 32
convolutions of 5 x 5 pixels with fixed random weights, ReLU, and each channel's mean over the picture.
Random weights serve for pictures that are not like ImageNet's (Naeem et al. 2020, arXiv 2002.09797,
section 5). Features are taken in coordinates in which true pictures vary alike in all directions; without
that the backgrounds' brightness would be all that counts. The numbers can be compared with each other, at
an equal number of pictures and with the same true ones, and with no published FID.
"""

import functools

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

SIDE = 32  # pictures are resized to it
KERNEL, STRIDE, CHANNELS = 5, 2, 32
_SEED = 2017


def features(images: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n d"]:
    """The means of the channels, for each picture."""
    pixels = np.stack([_resized(image) for image in images]).astype(np.float32) / 127.5 - 1
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (KERNEL, KERNEL), axis=(1, 2))
    made = np.einsum("nhwcyx,cyxd->nhwd", windows[:, ::STRIDE, ::STRIDE], _kernel(), optimize=True)
    return np.maximum(made, 0).mean(axis=(1, 2), dtype=np.float64)


def _resized(image: np.ndarray) -> np.ndarray:
    if image.shape[:2] == (SIDE, SIDE):
        return image
    return np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX))


@functools.lru_cache
def _kernel() -> Float[np.ndarray, "3 y x d"]:
    """Uniform about 0, of variance 2 / fan-in; of raw bits, so that it is the same in every NumPy."""
    shape = (3, KERNEL, KERNEL, CHANNELS)
    uniform = np.random.PCG64(_SEED).random_raw(int(np.prod(shape))).reshape(shape) * 2.0**-63 - 1
    return (uniform * np.sqrt(6 / (3 * KERNEL**2))).astype(np.float32)


def distance(made: Float[np.ndarray, "n d"], true: Float[np.ndarray, "m d"]) -> float:
    """|mu|^2 + tr(S + I - 2 S^(1/2)): `made` against `true`, whose mean is 0 and covariance I in these coordinates.

    >>> true = np.array([[0.0], [1.0], [2.0]])  # of variance 1
    >>> distance(true, true), distance(true + 3, true), distance(true * 2, true)
    (0.0, 9.0, 2.0)

    Args:
      made: features of at least 2 pictures.
      true: features of more pictures than there are features.

    Raises:
      ValueError: for fewer.
    """
    if len(made) < 2 or len(true) <= true.shape[1]:
        raise ValueError(
            f"a Fréchet distance needs at least 2 pictures and more than {true.shape[1]} true ones; "
            f"got {len(made)} and {len(true)}."
        )
    values, vectors = np.linalg.eigh(np.cov(true, rowvar=False).reshape(true.shape[1], -1))
    made = (made - true.mean(axis=0)) @ vectors / np.sqrt(values.clip(1e-9 * values.max()))
    mean = made.mean(axis=0)
    spread = np.linalg.eigvalsh(np.cov(made, rowvar=False).reshape(len(mean), -1)).clip(0)
    return round(float(mean @ mean + np.sum((np.sqrt(spread) - 1) ** 2)), 9)
