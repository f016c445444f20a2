import os
import pickle

import pytest
from fault_server import FaultServer, status

from mim.config import ConfigError
from mim.contracts import DataError, StorageError
from mim.data.location import check_storable, redact
from mim.data.store import Store
from mim.data.wire import Patience


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


def test_remote_and_local_locations_are_read_alike(files):
    with FaultServer() as server:
        url = server.put("/a.tar", bytes(range(100)))
        store = Store()
        assert store.pread(url, 10, 5) == bytes(range(10, 15))
        assert store.size(url) == 100
        assert store.size(files[0]) == 10
        store.close()


def test_only_a_regular_file_has_a_size(tmp_path):
    with pytest.raises(DataError, match="is not a regular file"):
        Store().size(str(tmp_path))
    with pytest.raises(StorageError, match="cannot read"):
        Store().size(str(tmp_path / "none"))


def test_a_pickled_store_keeps_its_patience():
    with FaultServer() as server:
        url = server.put("/a.tar", b"words", then=status(503))
        patience = Patience(total=0.1, first_wait=0.01)
        store = pickle.loads(pickle.dumps(Store(patience=patience)))
        assert store.remote.patience == patience
        with pytest.raises(StorageError, match="cannot read"):
            store.pread(url, 0, 1)


@pytest.mark.parametrize(
    "location",
    ["pipe:cat /etc/passwd", "file:///etc/passwd", "-", "", "ftp://host/a.tar", "data:,x", "FILE:/etc/passwd", "s3:a"],
)
def test_every_other_kind_of_location_is_refused(location):
    with pytest.raises(ConfigError, match=r"is refused; use a path|is no location of a shard"):
        Store().pread(location, 0, 1)
    with pytest.raises(ConfigError):
        Store().size(location)


def test_a_file_with_a_colon_in_its_name_is_read_by_its_path(tmp_path, monkeypatch):
    (tmp_path / "pipe:x").write_bytes(b"bytes")
    monkeypatch.chdir(tmp_path)
    assert Store().pread("./pipe:x", 0, 5) == b"bytes"
    assert Store().pread(f"{tmp_path}/pipe:x", 0, 5) == b"bytes"


@pytest.mark.parametrize(
    "location",
    [
        "https://user:hunter2@host/a.tar",
        "https://user:hun/ter2@host/a.tar",
        "https://user:hun?ter2@host/a.tar",
        "https://hunter2@host/a.tar",
        "https://hüñter2.example/a.tar",
    ],
)
def test_a_password_in_an_address_is_refused_and_not_repeated(location):
    with pytest.raises(ConfigError, match=r"plain host .* credentials do not belong") as raised:
        Store().pread(location, 0, 1)
    assert "hun" not in str(raised.value)


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("https://user:pw@host:8080/a/b.tar?sig=x#y", "https://host:8080/a/b.tar"),
        ("https://host?sig=x", "https://host"),
        ("hf://datasets/me/photos@v1/a.tar", "hf://datasets/me/photos@v1/a.tar"),
        ("https://user:p/w@host/a", "https://***"),
        ("/local/path?x", "/local/path?x"),
    ],
)
def test_messages_show_neither_userinfo_nor_query(location, shown):
    assert redact(location) == shown


@pytest.mark.parametrize("location", ["https://host/a\r\nX: y", "s3://bucket/a\0", "https:///a.tar"])
def test_an_address_that_no_request_can_hold_is_refused(location):
    with pytest.raises(ConfigError, match=r"control character|names no host"):
        Store().pread(location, 0, 1)


def test_a_lock_stores_no_signed_address():
    check_storable("https://host/a.tar", "the lock")
    check_storable("/local/a?b.tar", "the lock")
    with pytest.raises(ConfigError, match=r"the lock: https://host/a\.tar was given with a query") as raised:
        check_storable("https://host/a.tar?X-Amz-Signature=SIGNATURE", "the lock")
    assert "SIGNATURE" not in str(raised.value)
