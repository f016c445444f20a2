import io
import pickle

import numpy as np
import pytest

from mim.data import npy
from mim.data.formats import BadImage

RNG = np.random.default_rng(0)


def saved(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", ">u2", ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(6, 7), (6, 7, 5)])
def test_arrays_come_back_in_the_machine_s_byte_order(dtype, order, shape):
    array = np.asarray(RNG.integers(0, 200, shape), dtype=dtype, order=order)
    data = saved(array)
    pixels = npy.pixels(data)
    assert pixels.dtype == array.dtype.newbyteorder("=")
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    assert (pixels == array.reshape(6, 7, -1)).all()
    assert npy.header(data) == ("npy", pixels.shape[2], pixels.dtype.name, 6, 7)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4)), "an array of float64; uint8, uint16 and float32 are read"),
        (np.zeros((4, 4), dtype=np.int16), "an array of int16"),
        (np.zeros(4, dtype=np.uint8), "an array of shape"),
        (np.zeros((4, 0), dtype=np.uint8), "an array of shape"),
        (np.zeros((1, 2, 3, 4), dtype=np.uint8), "an array of shape"),
        (np.full((4, 4), np.nan, dtype=np.float32), "NaN or infinite"),
    ],
)
def test_other_arrays_are_refused(array, message):
    with pytest.raises(BadImage, match=message):
        npy.pixels(saved(array))


def test_objects_are_refused_and_nothing_is_unpickled(monkeypatch):
    data = saved(np.array([[{}]], dtype=object), allow_pickle=True)
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("unpickled"))
    for read in (npy.header, npy.pixels):
        with pytest.raises(BadImage, match="object"):
            read(data)


def test_a_claim_that_the_file_does_not_hold_is_refused_before_allocation():
    data = saved(np.zeros((4, 4), dtype=np.uint8))
    padding = b"(400000, 2000000), }"
    claimed = data.replace(b"(4, 4), }" + b" " * (len(padding) - 9), padding)
    assert len(claimed) == len(data)
    for read in (npy.header, npy.pixels):
        with pytest.raises(BadImage, match="the file is not whole"):
            read(claimed)


@pytest.mark.parametrize("length", [0, 5, 7, 9, 40, 127, 128, 143])
def test_truncated_arrays_are_refused(length):
    data = saved(np.zeros((4, 4), dtype=np.uint8))
    with pytest.raises(BadImage):
        npy.pixels(data[:length])
