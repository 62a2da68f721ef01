"""Pictures of any size and mode to uint8 RGB squares."""

import contextlib
import errno
import io
import os
import stat
import threading
import warnings

import numpy as np
from jaxtyping import UInt8
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")  # no decoder that is rarely used, none that runs programs
MAX_BYTES = 64 * 2**20  # of a file
MAX_PIXELS = 64 * 10**6  # of a picture, read from its header

_OF_THE_FILE = (  # what the system says of a file itself; its other errors are those of storage
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG,
    errno.EINVAL,  # a damaged header sends decoders to places that no file has
)  # fmt: skip
_LARGE_PIXELS = 16 * 10**6
_LARGE = threading.Lock()  # held while a large picture is decoded: one at a time, for the memory's sake
_ORIENTATION = 0x0112  # EXIF tag
_TOO_MANY_PIXELS = f"more than {MAX_PIXELS // 10**6} megapixels"
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnusableError(ValueError):
    """A file that no picture can be taken from; `reason` is short and the same for all such files."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def is_outage(error: Exception) -> bool:
    """Whether storage failed, which says nothing about a file; decoders' own OSErrors have no errno."""
    return isinstance(error, OSError) and error.errno is not None and error.errno not in _OF_THE_FILE


def open_image(file: str | io.IOBase) -> Image.Image:
    """Reads a picture's header; its pixels are decoded when they are first used.

    Raises:
      UnusableError: if it is none of `FORMATS`, or has no pixels, or more than `MAX_PIXELS`.
      OSError: if storage fails; see `is_outage`.
    """
    _make_bombs_errors()
    try:
        image = Image.open(file, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnusableError(_TOO_MANY_PIXELS, str(error)) from error
    except Exception as error:  # Pillow raises what its decoders do: OSError, SyntaxError, struct.error, ...
        if is_outage(error):
            raise
        raise UnusableError("not a readable picture", str(error)) from error
    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS:
        image.close()
        raise UnusableError(_TOO_MANY_PIXELS, f"{width} x {height}")
    return image


def _make_bombs_errors() -> None:
    """Pillow only warns of a decompression bomb; the filter stays, as another thread would undo catch_warnings."""
    if not any(f[0] == "error" and f[2] is Image.DecompressionBombWarning for f in warnings.filters):
        warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def decode(file: str | io.IOBase, size: int, **crop) -> UInt8[np.ndarray, "size size 3"]:
    """A picture file as an upright RGB square; `crop` as in `crop_of_example`.

    The first frame of an animation; colour profiles are not applied.

    Raises:
      UnusableError: whatever is wrong with the file.
    """
    with open_image(file) as image, _LARGE if image.width * image.height > _LARGE_PIXELS else contextlib.nullcontext():
        try:
            image.draft("RGB", (2 * size, 2 * size))  # JPEG: decodes at 1/2, 1/4 or 1/8, no smaller than this
            return crop_of_example(to_rgb(upright(image)), size, **crop)
        except Exception as error:
            raise UnusableError("broken pixel data", f"{type(error).__name__}: {error}") from error


def check_file_size(path: str) -> int:
    """Bytes of a regular file.

    Raises:
      UnusableError: if it is empty, larger than `MAX_BYTES` or no regular file (a pipe would block for ever).
      OSError: if storage fails; see `is_outage`.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        if is_outage(error):
            raise
        raise UnusableError("not a regular file", error.strerror) from error
    if not stat.S_ISREG(status.st_mode):
        raise UnusableError("not a regular file")
    size = status.st_size
    if size == 0:
        raise UnusableError("empty file")
    if size > MAX_BYTES:
        raise UnusableError(f"larger than {MAX_BYTES >> 20} MiB", f"{size} bytes")
    return size


def size_fault(width: int, height: int, min_side: int = 0, max_aspect: float = 0.0) -> str:
    """Why a picture of this size is filtered out; "" if it isn't.

    Args:
      min_side: pixels that the shorter side has at least; 0: any.
      max_aspect: how many times as long as the shorter side the longer one is at most; 0: any.
    """
    short, long = sorted((width, height))
    if short < min_side:
        return f"shorter side below {min_side} pixels"
    if max_aspect and long > max_aspect * short:
        return f"aspect ratio above {max_aspect:g}"
    return ""


def upright(image: Image.Image) -> Image.Image:
    """The picture as its EXIF orientation says it is to be seen; as it is where there is none."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # broken EXIF data of an otherwise sound picture
        return image
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def to_rgb(image: Image.Image, paper: str = "white") -> Image.Image:
    """Any mode to RGB: transparency on the paper, 16 and 32 bits scaled (not clipped) to 8."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        page = Image.fromarray(_eight_bits(values, image.mode)).convert("RGB")
        if "transparency" in image.info:  # the one value that stands for nothing
            page.paste(paper, mask=Image.fromarray(values == image.info["transparency"]))
        return page
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        page = Image.new("RGB", image.size, paper)
        page.paste(image, mask=image.getchannel("A"))
        return page
    return image.convert("RGB")


def _eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Grey values of more than 8 bits to uint8; the range is that of the format, not of the picture."""
    values = values.astype(np.float32)
    if mode.startswith("I;16") or values.max(initial=0) > 255:  # 16 bits, which Pillow may hand out as 32
        values = values * np.float32(255 / 65535)
    return np.clip(values + 0.5, 0, 255).astype(np.uint8)


def square(
    image: Image.Image, size: int, *, x: float = 0.5, y: float = 0.5, flip: bool = False
) -> UInt8[np.ndarray, "size size 3"]:
    """Resizes the shorter side to `size`, with antialiasing, and crops the longer one.

    Only the square that is kept is ever resized, so a picture of 1 x 100000 costs no more than another.

    Args:
      image: an RGB picture.
      size: side of the result in pixels.
      x, y: where the crop lies along the longer side, 0 (left, top) to 1 (right, bottom); 0.5 is the centre.
      flip: mirrors left and right.
    """
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) * x, (height - side) * y
    if (width, height) != (size, size):
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    pixels = np.asarray(image)
    return pixels[:, ::-1].copy() if flip else pixels


def crop_of_example(
    image: Image.Image, size: int, *, crop: str = "center", flip: bool = False, seed: tuple[int, ...] = (0,)
) -> UInt8[np.ndarray, "size size 3"]:
    """`square` with the crop and the flip that the data section of the config asks for.

    Args:
      crop: "center" or "random" (drawn from `seed`).
      flip: mirrors half of the seeds.
      seed: of the example: the same seed gives the same crop on any machine.

    Raises:
      ValueError: if `crop` is neither.
    """
    if crop not in ("center", "random"):
        raise ValueError(f"data.crop is {crop!r}; expected 'center' or 'random'.")
    x = y = 0.5
    mirrored = False
    if crop == "random" or flip:
        draws = np.random.default_rng(seed).random(3)
        mirrored = flip and draws[2] < 0.5
        if crop == "random":
            x, y = float(draws[0]), float(draws[1])
    return square(image, size, x=x, y=y, flip=bool(mirrored))
