"""How much of a picture survives its tokenizer: PSNR, SSIM, the codes in use, what can still be read."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Integer, UInt8
from scipy import ndimage

from muse_jax.evaluation import prompts

PSNR_CEILING = 100.0  # dB of a picture that is reproduced exactly
_SIGMA, _RADIUS = 1.5, 5  # SSIM's window: Gaussian, 11 x 11
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr(
    originals: UInt8[np.ndarray, "n h w c"], reconstructions: UInt8[np.ndarray, "n h w c"]
) -> Float[np.ndarray, "n"]:
    """Peak signal-to-noise ratio of each picture in dB, at most `PSNR_CEILING`.

    >>> black = np.zeros((1, 8, 8, 3), np.uint8)
    >>> psnr(black, black + 255).round(1).tolist(), psnr(black, black).tolist()
    ([0.0], [100.0])
    """
    error = originals.astype(np.float32) - reconstructions
    mse = np.mean(error**2, axis=(1, 2, 3), dtype=np.float64)
    return 10 * np.log10(255**2 / np.maximum(mse, 255**2 / 10 ** (PSNR_CEILING / 10)))


def ssim(
    originals: UInt8[np.ndarray, "n h w c"], reconstructions: UInt8[np.ndarray, "n h w c"]
) -> Float[np.ndarray, "n"]:
    """Structural similarity of each picture (Wang et al. 2004), the mean over positions and channels.

    As in the paper and `tf.image.ssim`: Gaussian window of 11 x 11 with sigma 1.5, K1 = 0.01,
    K2 = 0.03, population variances, and only windows that lie inside the picture.

    Raises:
      ValueError: the pictures are smaller than the window.
    """
    if min(originals.shape[1:3]) <= 2 * _RADIUS:
        raise ValueError(f"SSIM needs pictures of at least 11 x 11 pixels; got {list(originals.shape[1:3])}.")
    values = [_ssim_of_pair(a, b) for a, b in zip(originals, reconstructions, strict=True)]
    return np.array(values)


def _ssim_of_pair(first: np.ndarray, second: np.ndarray) -> float:
    x, y = first.astype(np.float64), second.astype(np.float64)
    mean_x, mean_y = _windows(x), _windows(y)
    var_x = _windows(x * x) - mean_x**2
    var_y = _windows(y * y) - mean_y**2
    covariance = _windows(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    contrast_structure = (2 * covariance + _C2) / (var_x + var_y + _C2)
    return float(np.mean(luminance * contrast_structure))


def _windows(values: np.ndarray) -> np.ndarray:
    """The Gaussian mean of each window inside the picture."""
    means = ndimage.gaussian_filter(values, (_SIGMA, _SIGMA, 0), radius=(_RADIUS, _RADIUS, 0))
    return means[_RADIUS:-_RADIUS, _RADIUS:-_RADIUS]


def codebook_usage(tokens: Integer[np.ndarray, "n ..."], codebook_size: int) -> dict[str, float | int]:
    """How the tokens of some pictures use the codebook.

    Returns:
      codebook_used: share of the codes that occur, 0..1; codes: how many that is;
      codebook_size; token_entropy: entropy of the codes' frequencies in nats, 0..log(codebook_size).

    Raises:
      ValueError: a token is no code.
    """
    if tokens.min() < 0 or tokens.max() >= codebook_size:
        raise ValueError(f"tokens lie in {tokens.min()}..{tokens.max()}; the codebook has 0..{codebook_size - 1}.")
    counts = np.bincount(tokens.ravel(), minlength=codebook_size)
    shares = counts[counts > 0] / counts.sum()
    return {
        "codebook_used": len(shares) / codebook_size,
        "codes": len(shares),
        "codebook_size": codebook_size,
        "token_entropy": float(max(-(shares * np.log(shares)).sum(), 0.0)),
    }


def measure(
    originals: UInt8[np.ndarray, "n h w 3"],
    reconstructions: UInt8[np.ndarray, "n h w 3"],
    tokens: Integer[np.ndarray, "n ..."],
    codebook_size: int,
    captions: Sequence[str] | None = None,
) -> dict[str, object]:
    """All figures of a tokenizer.

    Args:
      tokens: of the originals.
      captions: of the originals, where they are true renderings of scenes; what the reader makes of
        the reconstructions then bounds what any model of these tokens can reach.

    Returns:
      count, psnr (dB), ssim, the keys of `codebook_usage`; with captions also statements,
      all_statements and by_kind, as `prompts.summarize` has them.
    """
    figures: dict[str, object] = {
        "count": len(originals),
        "psnr": float(psnr(originals, reconstructions).mean()),
        "ssim": float(ssim(originals, reconstructions).mean()),
        **codebook_usage(tokens, codebook_size),
    }
    if captions is not None:
        pairs = zip(reconstructions, captions, strict=True)
        figures |= prompts.summarize([prompts.score(image, caption) for image, caption in pairs])
    return figures
