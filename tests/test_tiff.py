import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mim.data import tiff
from mim.data.decode import decode, read_header
from mim.data.formats import BadImage

RNG = np.random.default_rng(0)


def written(pixels, order="<", *, compression=1, predictor=1, planar=1, rows=4, tile=None, photometric=1, extra=0):
    """A TIFF of pixels (H, W, C), by the specification."""
    height, width, channels = pixels.shape
    planes = np.split(pixels, channels, axis=2) if planar == 2 else [pixels]
    h, w = tile or (rows, width)
    raw = []
    for plane in planes:
        for top in range(0, height, h):
            for left in range(0, width, w):
                block = plane[top : top + h, left : left + w]
                if tile:
                    block = np.pad(block, [(0, h - block.shape[0]), (0, w - block.shape[1]), (0, 0)], mode="edge")
                if predictor == 2:
                    block = np.diff(block, axis=1, prepend=np.zeros_like(block[:, :1]))
                raw.append(block.astype(pixels.dtype.newbyteorder(order)).tobytes())
    strips = [zlib.compress(strip) for strip in raw] if compression == 8 else raw
    sample_format = 3 if pixels.dtype.kind == "f" else 1
    tags = {
        256: ("H", [width]),
        257: ("H", [height]),
        258: ("H", [pixels.dtype.itemsize * 8] * channels),
        259: ("H", [compression]),
        262: ("H", [photometric]),
        273: ("I", [0] * len(strips)),
        277: ("H", [channels]),
        278: ("H", [rows]),
        279: ("I", [len(strip) for strip in strips]),
        284: ("H", [planar]),
        317: ("H", [predictor]),
        338: ("H", [extra] * (channels - (3 if photometric == 2 else 1))),
        339: ("H", [sample_format] * channels),
    }
    if tile:
        tags |= {322: ("H", [tile[1]]), 323: ("H", [tile[0]]), 324: tags.pop(273), 325: tags.pop(279)}
    tags = {tag: value for tag, value in sorted(tags.items()) if value[1]}
    size = sum(len(values) * struct.calcsize(kind) for kind, values in tags.values())
    body_at = 8 + 2 + 12 * len(tags) + 4
    start = body_at + size
    tags[324 if tile else 273] = ("I", list(start + np.cumsum([0, *map(len, strips[:-1])])))
    entries, body = b"", b""
    for tag, (kind, values) in tags.items():
        packed = struct.pack(f"{order}{len(values)}{kind}", *values)
        entries += struct.pack(order + "HHI", tag, {"H": 3, "I": 4}[kind], len(values))
        if len(packed) <= 4:
            entries += packed.ljust(4, b"\0")
            body += b"\0" * len(packed)
        else:
            entries += struct.pack(order + "I", body_at + len(body))
            body += packed
    magic = b"II*\0" if order == "<" else b"MM\0*"
    head = magic + struct.pack(order + "IH", 8, len(tags)) + entries + b"\0" * 4
    return head + body + b"".join(strips)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("tile", [None, (16, 16), (4, 8)])
@pytest.mark.parametrize("planar", [1, 2])
@pytest.mark.parametrize(("compression", "predictor"), [(1, 1), (8, 1), (8, 2)])
@pytest.mark.parametrize(("channels", "dtype"), [(5, "uint16"), (3, "uint16"), (7, "uint8"), (2, "float32")])
def test_any_number_of_channels_is_read_without_loss(order, planar, compression, predictor, channels, dtype, tile):
    if dtype == "float32" and predictor == 2:
        predictor = 1
    pixels = (RNG.random((11, 9, channels)) * 60000).astype(dtype)
    layout = {"planar": planar, "compression": compression, "predictor": predictor, "tile": tile}
    data = written(pixels, order, photometric=2 if channels == 3 else 1, **layout)
    assert read_header(data) == ("tif", channels, dtype, 11, 9)
    found = decode(data, channels, dtype).permute(1, 2, 0).numpy()
    assert found.dtype == dtype
    assert (found == pixels).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bit_alpha_is_composited_on_white(channels):
    pixels = RNG.integers(0, 65536, (6, 5, channels + 1)).astype(np.uint16)
    share = pixels[..., -1:] / 65535
    photometric = 2 if channels == 3 else 1
    plain = written(pixels, photometric=photometric, extra=2)
    assert read_header(plain)[:3] == ("tif", channels, "uint16")
    expected = pixels[..., :-1] * share + 65535 * (1 - share)
    assert np.abs(decode(plain, channels, "uint16").permute(1, 2, 0).numpy() - expected).max() <= 0.5 + 1e-6
    multiplied = (pixels * np.append(np.repeat(share, channels, 2), np.ones_like(share), 2)).round().astype(np.uint16)
    found = decode(written(multiplied, photometric=photometric, extra=1), channels, "uint16")
    assert np.abs(found.permute(1, 2, 0).numpy() - expected).max() <= 1


def test_a_fourth_sample_that_is_not_called_alpha_is_a_channel():
    pixels = RNG.integers(0, 256, (6, 5, 4)).astype(np.uint8)
    data = written(pixels, photometric=2, extra=0)
    assert read_header(data)[1] == 4
    assert (decode(data, 4).permute(1, 2, 0).numpy() == pixels).all()


def test_float_pages_of_one_channel_are_read():
    pixels = RNG.random((6, 5), dtype=np.float32)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "TIFF")
    assert (decode(buffer.getvalue(), 1, "float32")[0].numpy() == pixels).all()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "CMYK", "1", "P"])
def test_what_pillow_reads_as_it_is_stays_with_pillow(mode):
    buffer = io.BytesIO()
    Image.new(mode, (4, 4)).save(buffer, "TIFF")
    assert tiff.header(buffer.getvalue()) is None


@pytest.mark.parametrize(
    ("dtype", "options", "fact"),
    [
        ("uint16", {"compression": 5}, "compressed by method 5"),
        ("float32", {"predictor": 2}, "float32 with predictor 2"),
        ("uint16", {"tile": (16, 16)}, "in tiles of 60000 x 60000"),
    ],
)
def test_other_layouts_are_refused_with_a_way_out(dtype, options, fact):
    data = written(np.zeros((4, 4, 5), dtype=dtype), **options)
    for tag in (322, 323):
        data = data.replace(struct.pack("<HHIH", tag, 3, 1, 16), struct.pack("<HHIH", tag, 3, 1, 60000))
    with pytest.raises(BadImage, match=rf"{fact}; save it uncompressed or with deflate, or as \.npy"):
        decode(data, 5, dtype)


@pytest.mark.parametrize("compression", [1, 8])
def test_truncated_pages_are_refused(compression):
    data = written(RNG.integers(0, 65536, (8, 8, 5), dtype=np.uint16), compression=compression)
    for length in range(4, len(data) - 1, 13):
        with pytest.raises(BadImage):
            decode(data[:length], 5, "uint16")


def test_a_strip_is_never_inflated_beyond_its_rows():
    bomb = zlib.compress(bytes(1 << 24), 9)
    strip = written(np.zeros((4, 4, 5), dtype=np.uint16), compression=8)
    honest = zlib.compress(bytes(4 * 4 * 5 * 2))
    assert strip.endswith(honest)
    data = strip[: -len(honest)] + bomb
    at = data.index(struct.pack("<HHII", 279, 4, 1, len(honest)))
    data = data[:at] + struct.pack("<HHII", 279, 4, 1, len(bomb)) + data[at + 12 :]
    with pytest.raises(BadImage, match="longer than its strip"):
        decode(data, 5, "uint16")


def test_sizes_beyond_the_limits_are_refused_by_the_header():
    data = written(np.zeros((4, 4, 5), dtype=np.uint16))
    for tag in (256, 257):
        at = data.index(struct.pack("<HHI", tag, 3, 1)) + 8
        data = data[:at] + struct.pack("<H", 65000) + data[at + 2 :]
    with pytest.raises(BadImage, match="65000 x 65000 pixels"):
        read_header(data)
    with pytest.raises(BadImage, match="65000 x 65000 pixels"):
        decode(data, 5, "uint16")
