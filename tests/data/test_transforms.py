"""Pictures of every mode become the right uint8 squares."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from muse_jax.data import transforms


def encoded(image: Image.Image, kind: str = "PNG", **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def gradient(width: int, height: int) -> np.ndarray:
    """Red grows to the right, green to the bottom."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, np.full_like(x, 90)], -1).astype(np.uint8)


def png(width: int, height: int, depth: int, color: int, rows: bytes) -> io.BytesIO:
    """A PNG written by hand, for what Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def test_a_picture_of_the_right_size_is_unchanged():
    pixels = gradient(16, 16)
    result = transforms.decode(encoded(Image.fromarray(pixels)), 16)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, pixels)


@pytest.mark.parametrize(("width", "height"), [(40, 20), (20, 40), (21, 20), (7, 100), (1, 1), (1, 300), (300, 1)])
def test_any_shape_becomes_a_centred_square(width, height):
    result = transforms.decode(encoded(Image.fromarray(gradient(width, height))), 8)
    assert result.shape == (8, 8, 3)
    if min(width, height) > 1:  # the centre of the picture is the centre of the crop
        assert abs(result[..., 0].mean() - 127) < 8
        assert abs(result[..., 1].mean() - 127) < 8


def test_crops_lie_where_they_are_asked_for():
    image = Image.fromarray(gradient(40, 10))
    left, right = (transforms.square(image, 10, x=x) for x in (0.0, 1.0))
    np.testing.assert_array_equal(left, gradient(40, 10)[:, :10])
    np.testing.assert_array_equal(right, gradient(40, 10)[:, 30:])
    np.testing.assert_array_equal(transforms.square(image, 10, x=0.0, flip=True), left[:, ::-1])


def test_downscaling_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    result = transforms.square(Image.fromarray(stripes), 8)
    assert abs(result.astype(int) - 127).max() < 12  # without antialiasing: all black or all white


def test_random_crops_and_flips_are_drawn_from_the_seed():
    image = Image.fromarray(gradient(100, 10))
    crops = [transforms.crop_of_example(image, 10, crop="random", flip=True, seed=(1, i)) for i in range(40)]
    again = transforms.crop_of_example(image, 10, crop="random", flip=True, seed=(1, 3))
    np.testing.assert_array_equal(crops[3], again)
    assert len({c.tobytes() for c in crops}) > 30
    mirrored = sum(int(c[0, 0, 0]) > int(c[0, -1, 0]) for c in crops)
    assert 8 < mirrored < 32
    assert min(c[..., 0].min() for c in crops) < 30  # both ends of the picture are reached
    assert max(c[..., 0].max() for c in crops) > 225
    fixed = [transforms.crop_of_example(image, 10, seed=(1, i)) for i in range(3)]
    np.testing.assert_array_equal(fixed[0], fixed[2])
    with pytest.raises(ValueError, match="'middle'"):
        transforms.crop_of_example(image, 10, crop="middle")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_every_format_is_read(kind):
    result = transforms.decode(encoded(Image.fromarray(gradient(32, 32)), kind), 16)
    expected = transforms.square(Image.fromarray(gradient(32, 32)), 16)
    assert np.abs(result.astype(int) - expected).mean() < 12  # GIF has 256 colours


def test_formats_that_are_not_allowed_are_refused():
    for kind in ("TIFF", "EPS", "PPM", "ICO"):
        with pytest.raises(transforms.UnusableError) as caught:
            transforms.decode(encoded(Image.fromarray(gradient(32, 32)), kind), 16)
        assert caught.value.reason == "not a readable picture"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16"])
def test_every_mode_becomes_rgb(mode):
    grey = Image.fromarray(np.full((4, 4), 255, np.uint8))
    if mode == "I;16":
        image = Image.fromarray(np.full((4, 4), 65535, np.uint16))
    elif mode == "PA":
        image = grey.convert("P").convert("PA")
    elif mode in ("HSV", "LAB", "YCbCr"):
        image = grey.convert("RGB")
        image = image if mode == "LAB" else image.convert(mode)
    else:
        image = grey.convert(mode)
    result = transforms.to_rgb(image)
    assert result.mode == "RGB"
    assert np.asarray(result).min() >= 253, np.asarray(result).reshape(-1)[:3]


def test_grey_of_sixteen_bits_is_scaled_and_not_clipped():
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    result = transforms.decode(encoded(Image.fromarray(values)), 16)
    np.testing.assert_allclose(result[..., 0].reshape(-1), np.arange(256), atol=1)
    dark = np.full((4, 4), 200, np.uint16)  # nearly black, however small all its values are
    assert transforms.decode(encoded(Image.fromarray(dark)), 4).max() <= 1


def test_colour_of_sixteen_bits_is_scaled():
    row = b"\0" + struct.pack(">HHH", 65535, 32768, 0) * 2
    result = transforms.decode(png(2, 2, 16, 2, row * 2), 2)
    np.testing.assert_allclose(result[0, 0], [255, 128, 0], atol=1)


def test_transparency_becomes_white():
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)
    pixels[0, 1] = (200, 0, 0, 128)  # half
    pixels[1] = (0, 0, 0, 0)  # black under full transparency, as most programs leave it
    result = transforms.decode(encoded(Image.fromarray(pixels, "RGBA")), 2)
    assert result[0, 0].tolist() == [10, 20, 30]
    np.testing.assert_allclose(result[0, 1], [227, 127, 127], atol=2)
    assert (result[1] == 255).all()


def test_a_transparent_palette_entry_becomes_white():
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    result = transforms.to_rgb(Image.open(encoded(image, transparency=0)))
    assert np.asarray(result)[0].tolist() == [[255, 255, 255], [0, 0, 255]]


def test_a_transparent_grey_of_sixteen_bits_becomes_white():
    values = np.array([[300, 65535 // 2]], np.uint16)
    result = transforms.to_rgb(Image.open(encoded(Image.fromarray(values), transparency=300)))
    assert np.asarray(result)[0].tolist() == [[255, 255, 255], [127, 127, 127]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    # The picture as a viewer shows it, and how a camera that was held otherwise stores it.
    shown = Image.fromarray(gradient(16, 16))
    inverse = {
        1: lambda i: i,
        2: lambda i: i.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda i: i.transpose(Image.Transpose.ROTATE_180),
        4: lambda i: i.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda i: i.transpose(Image.Transpose.TRANSPOSE),
        6: lambda i: i.transpose(Image.Transpose.ROTATE_90),
        7: lambda i: i.transpose(Image.Transpose.TRANSVERSE),
        8: lambda i: i.transpose(Image.Transpose.ROTATE_270),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = inverse[orientation](shown)
    np.testing.assert_array_equal(transforms.decode(encoded(stored, exif=exif), 16), gradient(16, 16))


def test_broken_exif_does_not_cost_the_picture():
    file = encoded(Image.fromarray(gradient(16, 16)), "JPEG", exif=b"Exif\0\0" + b"\xff" * 40)
    assert transforms.decode(file, 8).shape == (8, 8, 3)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "green")]
    for kind in ("GIF", "WEBP", "PNG"):
        extra = {"lossless": True} if kind == "WEBP" else {}
        file = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **extra)
        assert transforms.decode(file, 8)[4, 4].tolist() == [255, 0, 0]


def test_a_large_jpeg_is_decoded_small(monkeypatch):
    file = encoded(Image.fromarray(gradient(2048, 1536)), "JPEG", quality=95)
    with transforms.open_image(file) as image:
        image.draft("RGB", (64, 64))
        assert image.size[0] < 512  # what decode relies on
    file.seek(0)
    result = transforms.decode(file, 32)
    exact = transforms.square(Image.fromarray(gradient(2048, 1536)), 32)
    assert np.abs(result.astype(int) - exact).max() < 8


def test_a_decompression_bomb_is_refused_from_its_header():
    for side in (8001, 10_000, 60_000):  # above our cap, above Pillow's warning, above Pillow's error
        with pytest.raises(transforms.UnusableError) as caught:
            transforms.open_image(png(side, side, 1, 0, b"\0" * 50_000))
        assert caught.value.reason == "more than 64 megapixels"
    transforms.open_image(png(8000, 8000, 1, 0, b"\0")).close()


def test_broken_pixels_are_named_as_such():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encoded(Image.fromarray(noise), "JPEG").getvalue()
    with pytest.raises(transforms.UnusableError) as caught:
        transforms.decode(io.BytesIO(data[: len(data) // 2]), 64)
    assert caught.value.reason == "broken pixel data"
