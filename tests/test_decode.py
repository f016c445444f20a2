import io
import struct
import subprocess
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from mim.data import decode as decoding
from mim.data.decode import BadImage, Encoded, decode, open_image, read_header

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
    assert read_header(data) == (ending, 3, "uint8", 20, 30)


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


def test_a_colour_profile_is_not_applied():
    inks = Image.new("CMYK", (8, 8), (30, 200, 90, 10))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert torch.equal(decode(encoded(inks, "JPEG")), decode(encoded(inks, "JPEG", icc_profile=profile)))


def test_one_bit_and_palettes_are_expanded():
    bits = RNG.random((9, 8)) < 0.5
    data = encoded(Image.fromarray(bits))
    assert read_header(data) == ("png", 1, "uint8", 9, 8)
    assert (decode(data, 1)[0].numpy() == bits * 255).all()
    palette = Image.fromarray(RGB).quantize(16)
    found = decode(encoded(palette))
    assert (found.permute(1, 2, 0).numpy() == np.asarray(palette.convert("RGB"))).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1)])
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_extreme_shapes_are_decoded(size, format):
    data = encoded(Image.new("RGB", size, (200, 200, 200)), format)
    assert decode(data).shape == open_image(data).shape == (3, *size[::-1])


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


def test_pixels_of_another_kind_than_the_dataset_are_refused():
    data = encoded(Image.fromarray(np.ones((4, 4), dtype=np.float32)), "TIFF")
    with pytest.raises(BadImage, match="pixels of float32 where the dataset has uint8"):
        decode(data)
    with pytest.raises(BadImage, match="pixels of mode 'I'"):
        decode(encoded(Image.fromarray(np.ones((4, 4), dtype=np.int32)), "TIFF"))


# ---- depth ---------------------------------------------------------------------------------------


def png16(pixels, colour_type, more=b""):
    """A 16-bit PNG of any colour type, written by the specification: Pillow writes gray alone."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + more + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


DEEP = RNG.integers(0, 65536, (9, 8, 4), dtype=np.uint16)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_gray_is_kept(format):
    data = encoded(Image.fromarray(DEEP[..., 0]), format)
    assert read_header(data) == (format.lower()[:3], 1, "uint16", 9, 8)
    pixels = decode(data, 1, "uint16")
    assert pixels.dtype == torch.uint16
    assert (pixels[0].numpy() == DEEP[..., 0]).all()
    assert (decode(data, 3, "uint16")[2].numpy() == DEEP[..., 0]).all()


def test_sixteen_bit_colour_png_is_kept():
    data = png16(DEEP[..., :3], 2)
    assert read_header(data) == ("png", 3, "uint16", 9, 8)
    assert (decode(data, 3, "uint16").permute(1, 2, 0).numpy() == DEEP[..., :3]).all()
    assert (decode(data).permute(1, 2, 0).numpy() == DEEP[..., :3] >> 8).all()
    gray = decode(data, 1, "uint16")[0].numpy()
    assert np.abs(gray - DEEP[..., :3] @ [0.299, 0.587, 0.114]).max() <= 0.5


@pytest.mark.parametrize(("colour_type", "channels"), [(4, 1), (6, 3)])
def test_sixteen_bit_alpha_is_composited_on_white(colour_type, channels):
    deep = DEEP[..., : channels + 1].astype(float)
    share = deep[..., -1:] / 65535
    expected = deep[..., :-1] * share + 65535 * (1 - share)
    data = png16(DEEP[..., : channels + 1], colour_type)
    assert read_header(data)[:3] == ("png", channels, "uint16")
    found = decode(data, channels, "uint16").permute(1, 2, 0).numpy()
    assert np.abs(found - expected).max() <= 0.5 + 1e-6


def test_a_truncated_sixteen_bit_colour_png_is_refused():
    data = png16(DEEP[..., :3], 2)
    with pytest.raises(BadImage):
        decode(data[: len(data) * 2 // 3], 3, "uint16")


def test_a_level_named_transparent_is_white_in_sixteen_bits():
    flat = np.full((4, 4), 700, dtype=np.uint16)
    data = encoded(Image.fromarray(flat), transparency=700)
    assert (decode(data, 1, "uint16").numpy() == 65535).all()
    body = b"tRNS" + DEEP[0, 0, :3].astype(">u2").tobytes()
    colour = png16(DEEP[..., :3], 2, struct.pack(">I", 6) + body + struct.pack(">I", zlib.crc32(body)))
    found = decode(colour, 3, "uint16").permute(1, 2, 0).numpy()
    assert (found[0, 0] == 65535).all()
    assert (found[1:] == DEEP[1:, :, :3]).all()


def test_eight_bits_fill_the_range_of_a_sixteen_bit_dataset():
    data = encoded(Image.fromarray(RGB))
    assert (decode(data, 3, "uint16").permute(1, 2, 0).numpy() == RGB.astype(np.uint16) * 257).all()


def test_a_sixteen_bit_ramp_has_the_mean_of_a_ramp():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(16, 0)
    for format in ("PNG", "TIFF"):
        assert abs(decode(encoded(Image.fromarray(ramp), format)).float().mean() - 127) <= 1


def test_other_numbers_of_channels_are_never_converted():
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((4, 5, 7), dtype=np.uint8))
    assert decode(buffer.getvalue(), 7).shape == (7, 4, 5)
    with pytest.raises(BadImage, match=r"7 channels, but data\.channels=3"):
        decode(buffer.getvalue(), 3)


# ---- a box of an encoded image -------------------------------------------------------------------


def test_a_jpeg_stays_encoded_and_its_boxes_are_those_of_the_whole():
    data = encoded(Image.fromarray(RNG.integers(0, 256, (100, 90, 3), dtype=np.uint8)), "JPEG", quality=90)
    for channels in (1, 3):
        image, whole = open_image(data, channels), decode(data, channels)
        assert isinstance(image, Encoded)
        assert image.shape == tuple(whole.shape)
        assert torch.equal(image.whole(), whole)
        for top, left, h, w in [(0, 0, 100, 90), (3, 5, 40, 60), (99, 89, 1, 1), (50, 0, 17, 90)]:
            assert torch.equal(image.cut(top, left, h, w), whole[:, top : top + h, left : left + w])


def test_what_cannot_be_cut_comes_decoded():
    turned = Image.Exif()
    turned[0x0112] = 6
    image = Image.fromarray(RGB)
    for data in (encoded(image, "JPEG", progressive=True), encoded(image, "JPEG", exif=turned), encoded(image)):
        assert torch.equal(open_image(data), decode(data))
    jpeg = encoded(image, "JPEG")
    assert torch.equal(open_image(jpeg, 3, "uint16"), decode(jpeg, 3, "uint16"))


# ---- hostile bytes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n{} loop\n",
        b"\xd7\xcd\xc6\x9a" + bytes(60),  # WMF
        b"\x0a\x05\x01\x08" + bytes(124),  # PCX
        b"P6 4 4 255\n" + bytes(48),
        b"GIF89a" + bytes(60),
    ],
)
def test_formats_outside_the_list_are_refused_without_a_process(data, monkeypatch):
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: started.append(1))
    for read in (read_header, decode, open_image):
        with pytest.raises(BadImage, match="not a JPEG, PNG, WebP, BMP, TIFF"):
            read(data)
    assert not started


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_small_png_of_144_million_pixels_is_refused_by_its_header():
    data = png16(DEEP[..., :3], 2)
    claim = struct.pack(">II", 12000, 12000)
    data = data[:16] + claim + data[24:29] + struct.pack(">I", zlib.crc32(b"IHDR" + claim + data[24:29])) + data[33:]
    for read in (read_header, decode, open_image):
        with pytest.raises(BadImage, match="12000 x 12000 pixels"):
            read(data)


def test_a_jpeg_that_claims_65500_squared_is_refused_by_its_header():
    data = bytearray(encoded(Image.fromarray(RGB), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 65500, 65500)
    for read in (read_header, decode, open_image):
        with pytest.raises(BadImage, match=r"pixels.*67108864"):
            read(bytes(data))
