"""The cut is exact, and being cut changes nothing about which files are accepted."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from mim.data import decode as decoding
from mim.data import jpeg
from mim.data.decode import BadImage, decode, open_image

RNG = np.random.default_rng(0)
NOISE = Image.fromarray(RNG.integers(0, 256, (90, 70, 3), dtype=np.uint8)).filter(ImageFilter.GaussianBlur(1))


@pytest.fixture(params=["simplejpeg", "Pillow"])
def library(request, monkeypatch):
    """What decodes: the optional library, or Pillow as in an environment without it."""
    if request.param == "Pillow":
        monkeypatch.setattr(jpeg, "simplejpeg", None)
    elif jpeg.simplejpeg is None:
        pytest.skip("simplejpeg is not installed")
    return request.param


def encoded(image=NOISE, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 85} | options)
    return buffer.getvalue()


def open_pillow(data):
    return Image.open(io.BytesIO(data))


def pillow(data):
    with open_pillow(data) as image:
        return np.asarray(image).reshape(image.height, image.width, -1)


KINDS = [
    *({"subsampling": name} for name in ("4:4:4", "4:2:2", "4:2:0")),
    {"quality": 100},
    {"quality": 30},
    {"restart_marker_blocks": 3},
    {"restart_marker_rows": 1},
    {"optimize": True},
    {"comment": b"\xff\xd8 no marker \xff\xd9"},
]


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_rows_of_a_box_are_bit_for_bit_those_of_full_decoding(options, mode):
    data = encoded(NOISE.convert(mode), **options)
    whole, found = pillow(data), jpeg.parse(data)
    assert found[:3] == whole.shape
    assert (jpeg.pixels(data, found) == whole).all()
    for bottom in range(1, 91):
        top, left, right = max(0, bottom - 1 - bottom % 40), bottom % 30, 40 + bottom % 31
        rows = jpeg.pixels(data, found, (top, left, bottom - top, right - left))
        assert (rows == whole[top:bottom, left:right]).all()


@pytest.mark.parametrize("subsampling", ["440", "411"])
def test_rare_subsamplings_are_exact_too(subsampling):
    simplejpeg = pytest.importorskip("simplejpeg")
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(NOISE), 85, colorsubsampling=subsampling)
    whole, found = pillow(data), jpeg.parse(data)
    for bottom in range(1, 91):
        assert (jpeg.pixels(data, found, (0, 0, bottom, 70)) == whole[:bottom]).all()


@pytest.mark.usefixtures("library")
def test_what_was_decoded_stays_when_the_next_image_is_decoded():
    first, second = encoded(), encoded(NOISE.transpose(Image.Transpose.FLIP_TOP_BOTTOM))
    kept = jpeg.pixels(first, jpeg.parse(first), (10, 10, 40, 40))
    whole = jpeg.pixels(first, jpeg.parse(first))
    before = kept.copy(), whole.copy()
    jpeg.pixels(second, jpeg.parse(second), (10, 10, 40, 40))
    jpeg.pixels(second, jpeg.parse(second))
    assert (kept == before[0]).all()
    assert (whole == before[1]).all()


@pytest.mark.usefixtures("library")
def test_only_the_rows_down_to_the_box_are_decoded(monkeypatch):
    data = encoded(subsampling="4:2:0")
    seen = []
    inner = jpeg._decode

    def decode(data, shape, *, reuse):
        pixels = inner(data, shape, reuse=reuse)
        seen.append(pixels.shape[0])
        return pixels

    monkeypatch.setattr(jpeg, "_decode", decode)
    jpeg.pixels(data, jpeg.parse(data), (0, 0, 10, 70))
    jpeg.pixels(data, jpeg.parse(data), (0, 0, 15, 70))
    assert seen == [16, 32]  # of 90: blocks are 16 rows, and the colour of row 14 looks below


def test_what_is_unusual_is_left_to_pillow():
    plain = encoded()
    at = plain.index(b"\xff\xda")
    assert jpeg.parse(plain) is not None
    assert jpeg.parse(encoded(progressive=True)) is None
    assert jpeg.parse(encoded(NOISE.convert("CMYK"))) is None
    assert jpeg.parse(plain[:-2]) is None  # no end
    assert jpeg.parse(plain + b"trailing") is None
    assert jpeg.parse(plain + plain) is None
    assert jpeg.parse(plain[: at + 40] + b"\xff\xc4" + plain[at + 40 :]) is None  # a table inside the scan
    assert jpeg.parse(plain.replace(bytes((0, 63, 0)), bytes((0, 64, 0)), 1)) is None
    tall = bytearray(plain)
    tall[jpeg.parse(plain).height_at : jpeg.parse(plain).height_at + 2] = b"\xff\xfe"
    assert jpeg.parse(bytes(tall)) is None
    for length in range(0, at, 7):
        assert jpeg.parse(plain[:length]) is None
        assert jpeg.parse(plain[:length] + b"\xff\xd9") is None


@pytest.mark.parametrize("value", [1, 6, 0, 9])
def test_the_orientation_is_that_of_exif_and_unknown_ones_turn_nothing(value):
    exif = Image.Exif()
    exif[0x0112] = value
    data = encoded(exif=exif)
    assert jpeg.parse(data).orientation == (value if value in range(1, 9) else 1)
    assert (decode(data).permute(1, 2, 0).numpy() == np.asarray(ImageOps.exif_transpose(open_pillow(data)))).all()


def test_an_orientation_in_xmp_is_left_to_pillow_unless_exif_has_one():
    xmp = b'<x tiff:Orientation="6"/>'
    exif = Image.Exif()
    exif[0x0112] = 3
    assert jpeg.parse(encoded(xmp=b"<x/>")).orientation == 1
    assert jpeg.parse(encoded(xmp=xmp)) is None
    assert (
        jpeg.parse(encoded(xmp=xmp, exif=exif)).orientation
        == 3
        == open_pillow(encoded(xmp=xmp, exif=exif)).getexif()[0x0112]
    )
    two = encoded(exif=exif)
    two = two[:2] + two[2 : two.index(b"\xff\xdb")] + two[2:]
    assert jpeg.parse(two) is None  # Pillow joins the blocks


def verdict(data):
    """Whether an image is accepted, and the rows that a view of its upper part sees."""
    try:
        image = open_image(data)
        upper = max(1, image.shape[1] // 2)
        pixels = image[:, :upper] if not hasattr(image, "cut") else image.cut(0, 0, upper, image.shape[2])
        return pixels.numpy().tobytes()
    except BadImage:
        return None


def broken():
    """Files damaged in every part: cut, bits flipped, runs overwritten, markers planted."""
    rng = np.random.default_rng(1)
    sources = [encoded(), encoded(restart_marker_rows=1), encoded(NOISE.convert("L")), encoded(progressive=True)]
    for i in range(400):
        data = bytearray(sources[i % 4])
        place = int(rng.integers(2, len(data) - 2)) if i % 3 else int(rng.integers(2, 700))
        match i % 5:
            case 0:
                data = data[:place]
            case 1:
                data[place] ^= 1 << int(rng.integers(8))
            case 2:
                data[place : place + 9] = rng.bytes(9)
            case 3:
                data[place : place + 2] = bytes((0xFF, int(rng.integers(0xC0, 0xFF))))
            case 4:
                data = data[:place] + b"\xff\xd9"
        yield bytes(data)


@pytest.mark.filterwarnings("ignore")  # Pillow's, on corrupt metadata
def test_every_environment_accepts_the_same_broken_files_with_the_same_pixels(monkeypatch):
    files = list(broken())
    with_library = [verdict(data) for data in files]
    monkeypatch.setattr(jpeg, "simplejpeg", None)
    without = [verdict(data) for data in files]
    monkeypatch.setattr(jpeg, "parse", lambda data: None)
    by_pillow = [verdict(data) for data in files]
    accepted = sum(found is not None for found in by_pillow)
    assert 50 < accepted < 350
    assert [found is None for found in with_library] == [found is None for found in by_pillow]
    assert [found is None for found in without] == [found is None for found in by_pillow]
    assert with_library == by_pillow
    assert without == by_pillow


def test_a_file_that_the_decoder_refuses_gets_the_verdict_of_pillow(monkeypatch):
    data = encoded()
    monkeypatch.setattr(jpeg, "_decode", lambda *_, **__: (_ for _ in ()).throw(ValueError("no")))
    assert (decode(data).permute(1, 2, 0).numpy() == pillow(data)).all()
    assert (open_image(data).cut(2, 3, 4, 5).permute(1, 2, 0).numpy() == pillow(data)[2:6, 3:8]).all()


def test_running_out_of_memory_is_not_the_image_s_fault(monkeypatch):
    monkeypatch.setattr(jpeg, "_decode", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        decoding.decode(encoded())
