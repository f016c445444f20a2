import os
import pickle

import pytest

from mim.contracts import DataError, StorageError
from mim.data.store import Store


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"{i}.bin" for i in range(5)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 10)
    return [str(path) for path in paths]


def test_reads_exactly_what_is_asked_for(files):
    assert Store().pread(files[3], 2, 4) == b"\3\3\3\3"


def test_the_number_of_open_files_is_bounded(files):
    store = Store(max_open=2)
    before = len(os.listdir("/proc/self/fd"))
    for path in files * 2:
        store.pread(path, 0, 1)
    assert len(os.listdir("/proc/self/fd")) == before + 2
    store.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_short_file_and_a_missing_file_are_told_apart(files, tmp_path):
    with pytest.raises(DataError, match="2 bytes short"):
        Store().pread(files[0], 8, 4)
    with pytest.raises(StorageError, match="cannot read"):
        Store().pread(str(tmp_path / "none"), 0, 1)


def test_a_pickled_store_opens_its_own_files(files):
    store = Store(max_open=3)
    store.pread(files[0], 0, 1)
    copy = pickle.loads(pickle.dumps(store))
    store.close()
    assert copy.max_open == 3
    assert copy.pread(files[1], 0, 1) == b"\1"
