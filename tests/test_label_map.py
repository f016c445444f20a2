"""A label map is read as it was written: gray levels and palette indices are classes, and nothing else is a map."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from mim.contracts import IGNORE
from mim.data.decode import BadImage
from mim.data.label_map import colours, decode_label_map, encode_label_map, largest, resized, without_zero

CLASSES = np.random.default_rng(0).integers(0, 21, (12, 17), dtype=np.uint8)


def png(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def raw_png(rows, *, bits, kind):
    """A PNG whose packed rows of bytes are given."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", len(rows[0]) * 8 // bits, len(rows), bits, kind, 0, 0, 0)
    palette = chunk(b"PLTE", bytes(range(3 * 2**bits))) if kind == 3 else b""
    data = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + palette + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_gray_levels_are_the_classes():
    assert decode_label_map(png(Image.fromarray(CLASSES)), (12, 17), 21).numpy().tolist() == CLASSES.tolist()


def test_palette_indices_are_the_classes_and_colours_mean_nothing():
    image = Image.fromarray(CLASSES, "L").convert("P")
    image.putdata(CLASSES.ravel().tolist())
    image.putpalette([7] * 768)  # all colours alike
    assert decode_label_map(png(image, transparency=3), (12, 17), 21).numpy().tolist() == CLASSES.tolist()


@pytest.mark.parametrize("kind", [0, 3])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_fewer_bits_hold_the_classes_as_they_are(kind, bits):
    rows = [[0b00011011, 0b11100100], [0b10101010, 0b00001111]]
    expected = [[byte >> shift & (2**bits - 1) for byte in row for shift in range(8 - bits, -1, -bits)] for row in rows]
    found = decode_label_map(raw_png(rows, bits=bits, kind=kind), (2, 16 // bits))
    assert found.tolist() == expected


def oriented():
    exif = Image.Exif()
    exif[0x0112] = 6
    return png(Image.fromarray(CLASSES), exif=exif)


def jpeg():
    buffer = io.BytesIO()
    Image.fromarray(CLASSES).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (png(Image.fromarray(CLASSES).convert("RGB")), "PNG of 8 bits RGB"),
        (png(Image.fromarray(CLASSES).convert("LA")), "PNG of 8 bits gray with transparency"),
        (png(Image.fromarray(CLASSES.astype(np.uint16))), "PNG of 16 bits gray"),
        (png(Image.fromarray(CLASSES[:, :16])), "its label map is 12 x 16, but the image 12 x 17"),
        (png(Image.fromarray(CLASSES))[:-40], "its label map: "),
        (png(Image.fromarray(CLASSES + np.uint8(10))), "holds class 30, but there are 21 classes"),
        (oriented(), "an EXIF orientation of its own"),
        (jpeg(), "is no PNG"),
        (b"", "is no PNG"),
    ],
)
def test_what_is_no_map_of_these_classes_and_this_size_is_refused(data, reason):
    with pytest.raises(BadImage, match=reason):
        decode_label_map(data, (12, 17), 21)


def test_ignored_pixels_are_no_class_beyond_the_last():
    ignored = np.full((2, 3), IGNORE, np.uint8)
    assert largest(ignored) == -1
    assert decode_label_map(png(Image.fromarray(ignored)), (2, 3), 1).tolist() == ignored.tolist()


def test_without_zero_every_class_moves_down_and_zero_is_ignored():
    found = without_zero(torch.tensor([[0, 1, 2, 150, 254, 255]], dtype=torch.uint8))
    assert found.tolist() == [[255, 0, 1, 149, 253, 255]]


def test_a_map_survives_encoding():
    label_map = torch.from_numpy(CLASSES)
    assert torch.equal(decode_label_map(encode_label_map(label_map), (12, 17)), label_map)


@pytest.mark.parametrize("size", [(12, 17), (5, 40), (31, 3), (1, 1), (24, 34)])
def test_resizing_takes_the_class_at_the_centre_of_each_pixel(size):
    label_map = torch.from_numpy(CLASSES)
    expected = F.interpolate(label_map[None, None], size=size, mode="nearest-exact")[0, 0]
    assert torch.equal(resized(label_map, size), expected)


def test_every_class_has_a_colour_of_its_own():
    assert len({tuple(colour) for colour in colours().tolist()}) == 256
    assert colours()[[0, 1, 15, IGNORE]].tolist() == [[0, 0, 0], [128, 0, 0], [192, 128, 128], [255, 255, 255]]
