import io

import numpy as np
import pytest
from PIL import Image

from mim.data import decode as decoding
from mim.data.decode import BadImage, decode, read_header

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("format", "ending", "options"),
    [
        ("PNG", "png", {}),
        ("BMP", "bmp", {}),
        ("TIFF", "tif", {}),
        ("WEBP", "webp", {"lossless": True}),
    ],
)
def test_lossless_formats_give_back_the_pixels(format, ending, options):
    data = encoded(Image.fromarray(RGB), format, **options)
    assert (decode(data).permute(1, 2, 0).numpy() == RGB).all()
    assert read_header(data) == (ending, 3)


def test_jpeg_agrees_with_pillow():
    data = encoded(Image.fromarray(RGB), "JPEG")
    assert (decode(data).permute(1, 2, 0).numpy() == np.asarray(Image.open(io.BytesIO(data)))).all()


def test_channels_convert_both_ways():
    gray = encoded(Image.fromarray(RGB[..., 0]))
    assert read_header(gray).channels == 1
    assert (decode(gray, 1)[0].numpy() == RGB[..., 0]).all()
    assert (decode(gray, 3).numpy() == RGB[..., 0]).all()
    luma = decode(encoded(Image.fromarray(RGB)), 1)
    assert luma.shape == (1, 20, 30)
    assert np.abs(luma[0].numpy() - RGB @ [0.299, 0.587, 0.114]).max() < 1
    with pytest.raises(ValueError, match=r"data\.channels=2"):
        decode(gray, 2)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_gray_is_scaled_not_clipped(format):
    deep = RNG.integers(0, 65536, (9, 8), dtype=np.uint16)
    data = encoded(Image.fromarray(deep), format)
    assert read_header(data).channels == 1
    assert (decode(data, 1)[0].numpy() == deep >> 8).all()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(format, orientation):
    base = np.zeros((16, 32, 3), dtype=np.uint8)
    base[:8, :16] = 255  # the top left quarter tells all eight apart, with the aspect
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(base), format, exif=exif)
    stored = base[..., 0] > 127
    turned = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.T,
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].T,
        8: np.rot90(stored),
    }
    assert ((decode(data, 1)[0].numpy() > 127) == turned[orientation]).all()


def test_broken_exif_counts_as_absent():
    data = encoded(Image.fromarray(RGB), "JPEG", exif=b"Exif\0\0garbage")
    assert decode(data).shape == (3, 20, 30)


def test_transparency_is_composited_on_white():
    clear = np.zeros((4, 4, 4), dtype=np.uint8)
    assert (decode(encoded(Image.fromarray(clear))) == 255).all()
    half = clear + np.array([0, 0, 0, 128], dtype=np.uint8)
    assert (decode(encoded(Image.fromarray(half))).int() - 127).abs().max() <= 1
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30])
    assert (decode(encoded(palette, transparency=0)) == 255).all()
    assert decode(encoded(palette))[:, 0, 0].tolist() == [10, 20, 30]
    gray = Image.new("LA", (4, 4), (0, 0))
    assert read_header(encoded(gray)).channels == 1
    assert (decode(encoded(gray), 1) == 255).all()


def test_cmyk_becomes_rgb():
    data = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    red, green, blue = decode(data)[:, 4, 4].tolist()
    assert red > 240
    assert max(green, blue) < 15


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    assert decode(data)[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_truncated_images_are_refused(format):
    data = encoded(Image.fromarray(RGB), format)
    with pytest.raises(BadImage):
        decode(data[: len(data) * 2 // 3])


@pytest.mark.parametrize("data", [b"", b"hello", encoded(Image.fromarray(RGB), "GIF"), b"\xff\xd8\xff" + b"\0" * 50])
def test_other_bytes_are_refused(data):
    with pytest.raises(BadImage):
        decode(data)
    with pytest.raises(BadImage):
        read_header(data)


def test_size_is_limited_before_pixels_are_decoded(monkeypatch):
    data = encoded(Image.fromarray(RGB))
    monkeypatch.setattr(decoding, "MAX_PIXELS", 599)
    with pytest.raises(BadImage, match="30 x 20 pixels"):
        read_header(data)
    monkeypatch.setattr(decoding, "MAX_BYTES", 10)
    with pytest.raises(BadImage, match="limit of 10"):
        decode(data)


def test_float_images_are_refused():
    with pytest.raises(BadImage, match="mode 'F'"):
        decode(encoded(Image.fromarray(np.ones((4, 4), dtype=np.float32)), "TIFF"))
