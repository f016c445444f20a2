import os
import zlib

import pytest

from mim.data.checksum import crc32


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 255, 4096, 100_003])
def test_every_environment_computes_the_crc32_of_zlib(size):
    data = os.urandom(size)
    assert crc32(data) == zlib.crc32(data)
