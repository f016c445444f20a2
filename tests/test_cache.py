import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fault_server import FaultServer, cut, serve_dataset, status, trickle

from mim import build
from mim.config import ConfigError
from mim.contracts import DataError, StorageError
from mim.data import cache as cache_module
from mim.data.cache import FOLDER, STAMP, RemoteShard, ShardCache
from mim.data.shards import LOCK, Dataset
from mim.data.wire import Patience

BODY = random.Random(0).randbytes(200_000)
HASTE = Patience(silence=0.5, min_rate=50_000, total=3, unreachable=0.3, first_wait=0.01, longest_wait=0.1)


@pytest.fixture
def server():
    with FaultServer() as running:
        yield running


@pytest.fixture
def cache(tmp_path):
    opened = ShardCache(tmp_path / "cache", patience=HASTE)
    yield opened
    opened.close()


def put(server, path="/a.tar", body=BODY, *, known=True, **faults):
    """Serve a shard; return it as a lock describes it."""
    return RemoteShard(server.put(path, body, **faults), len(body), hashlib.sha256(body).hexdigest() if known else None)


def published(cache):
    return sorted(path.name for path in cache.folder.glob("*.tar"))


def unfinished(cache):
    return sorted(cache.folder.glob("*.part"))


def test_a_shard_is_downloaded_once_and_read_anywhere(server, cache):
    shard = put(server)
    for offset in (0, 777, 199_990):
        assert cache.pread(shard, offset, 10) == BODY[offset : offset + 10]
    assert server.count("/a.tar") == 1
    assert published(cache) == [f"{shard.sha256}.tar"]
    assert ShardCache(cache.folder).pread(shard, 5, 5) == BODY[5:10]
    assert server.count("/a.tar") == 1


def test_equal_names_of_two_hosts_are_two_shards(server, cache):
    other = BODY[::-1]
    with FaultServer() as second:
        for known in (True, False):
            assert cache.pread(put(server, known=known), 0, 9) == BODY[:9]
            assert cache.pread(put(second, body=other, known=known), 0, 9) == other[:9]


def test_equal_content_at_two_addresses_is_one_file(server, cache):
    cache.fetch(put(server, "/a.tar"))
    cache.fetch(put(server, "/b.tar"))
    assert server.count("/b.tar") == 0


def test_the_folder_is_for_its_owner_alone(server, cache):
    cache.fetch(put(server))
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in cache.folder.iterdir()} == {0o600}


def test_a_folder_that_others_may_write_into_is_refused(server, cache):
    cache.folder.mkdir()
    cache.folder.chmod(0o777)
    with pytest.raises(ConfigError, match="no safe place for a cache"):
        cache.fetch(put(server))
    assert server.count("/a.tar") == 0


def test_a_folder_that_is_a_link_is_refused(server, cache, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    cache.folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="no safe place for a cache"):
        cache.fetch(put(server))


def test_a_link_in_the_place_of_a_shard_is_not_followed(server, cache, tmp_path):
    shard = put(server)
    cache.folder.mkdir(0o700)
    (tmp_path / "evil").write_bytes(BODY[::-1])
    (cache.folder / f"{shard.sha256}.tar").symlink_to(tmp_path / "evil")
    assert cache.pread(shard, 0, 10) == BODY[:10]
    assert (tmp_path / "evil").read_bytes() == BODY[::-1]


def test_a_cut_download_is_resumed_from_where_it_ended(server, cache):
    shard = put(server, faults=[cut(150_000), cut(20_000)])
    assert cache.pread(shard, 0, len(BODY)) == BODY
    assert server.fired["/a.tar"] == ["cut", "cut"]
    assert server.sent["/a.tar"] == len(BODY)


@pytest.mark.parametrize("known", [True, False], ids=["hash-known", "headers-only"])
def test_a_download_that_was_killed_is_resumed_by_the_next_process(server, cache, known):
    shard = put(server, known=known, faults=[None, trickle(100_000)] if not known else [trickle(100_000)])
    process = multiprocessing.get_context("fork").Process(target=cache.fetch, args=(shard,))
    process.start()
    wait_until(lambda: any(part.stat().st_size > 20_000 for part in unfinished(cache)))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert published(cache) == []
    (part,) = unfinished(cache)
    begun = part.stat().st_size
    assert cache.pread(shard, 0, len(BODY)) == BODY
    assert f"bytes={begun}-199999" in [request["Range"] for request in server.requests["/a.tar"]]
    assert unfinished(cache) == []


def test_a_damaged_unfinished_download_is_begun_anew(server, cache):
    shard = put(server)
    cache.folder.mkdir(0o700)
    (cache.folder / f"{shard.sha256}.tar.{shard.size}.part").write_bytes(bytes(5000))
    assert cache.pread(shard, 0, len(BODY)) == BODY
    assert [request["Range"] for request in server.requests["/a.tar"]] == ["bytes=5000-199999", "bytes=0-199999"]


def test_unfinished_downloads_of_long_ago_are_removed(server, cache):
    cache.folder.mkdir(0o700)
    old, new = (cache.folder / f"{digit * 64}.tar.1000.part" for digit in "01")
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (0, time.time() - 2 * 24 * 3600))
    cache.fetch(put(server))
    assert unfinished(cache) == [new]


def test_four_processes_at_once_make_one_download(server, cache):
    server.bandwidth = 2_000_000
    shard = put(server)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.starmap(cache.pread, [(shard, 10 * i, 10) for i in range(16)], chunksize=1)
    assert found == [BODY[10 * i : 10 * i + 10] for i in range(16)]
    assert server.count("/a.tar") == 1


def test_who_waits_for_a_download_does_not_wait_for_its_readers(server, cache):
    """A reader holds its shard for long; a process that asked while it was downloaded must not wait for that."""
    server.bandwidth = 500_000
    shard = put(server)
    fork = multiprocessing.get_context("fork")
    waiting = [fork.Process(target=cache.fetch, args=(shard,)) for _ in range(3)]
    for process in waiting:
        process.start()
    assert cache.pread(shard, 0, 10) == BODY[:10]  # and holds it
    for process in waiting:
        process.join(10)
    assert [process.exitcode for process in waiting] == [0, 0, 0]


@pytest.mark.parametrize("known", [True, False], ids=["hash-known", "headers-only"])
@pytest.mark.parametrize("damage", ["cut", "poisoned", "emptied"])
def test_a_copy_that_was_changed_is_fetched_again_before_use(server, cache, damage, known, capsys):
    shard = put(server, known=known)
    cache.fetch(shard)
    path = cache.folder / published(cache)[0]
    changed = {"cut": BODY[:-1], "poisoned": b"x" + BODY[1:], "emptied": b""}[damage]
    path.write_bytes(changed)
    assert ShardCache(cache.folder).pread(shard, 0, len(BODY)) == BODY
    assert server.sent["/a.tar"] >= 2 * len(BODY)
    assert "is damaged; it is fetched again" in capsys.readouterr().err


def test_a_copy_that_was_only_touched_is_hashed_and_kept(server, cache):
    shard = put(server)
    cache.fetch(shard)
    path = cache.folder / published(cache)[0]
    path.touch()
    assert cache.pread(shard, 0, 10) == BODY[:10]
    assert path.stat().st_mtime_ns == STAMP
    assert server.count("/a.tar") == 1


def test_another_shard_at_the_address_is_a_data_error_after_two_downloads(server, cache):
    shard = put(server)._replace(sha256="0" * 64)
    with pytest.raises(DataError, match=r"/a\.tar is not the shard of the lock"):
        cache.pread(shard, 0, 10)
    assert server.sent["/a.tar"] == 2 * len(BODY)
    assert published(cache) == unfinished(cache) == []


@pytest.mark.parametrize("known", [True, False], ids=["hash-known", "headers-only"])
def test_another_size_at_the_address_is_a_data_error(server, cache, known):
    shard = put(server, known=known)
    server.put("/a.tar", BODY + b"more")
    with pytest.raises(DataError, match=r"/a\.tar has 200004 bytes instead of the 200000 of the lock"):
        cache.pread(shard, 0, 10)
    assert published(cache) == unfinished(cache) == []


def test_a_shard_of_unknown_hash_is_named_by_its_etag_and_its_hash_is_recorded(server, cache):
    shard = put(server, known=False)
    cache.fetch(shard)
    (name,) = published(cache)
    assert name.startswith("u-")
    assert (cache.folder / name).with_suffix(".sha256").read_text() == hashlib.sha256(BODY).hexdigest()
    server.put("/a.tar", BODY[::-1], etag='"2"')
    assert ShardCache(cache.folder).pread(shard, 0, 9) == BODY[::-1][:9]
    assert len(published(cache)) == 2


def test_a_server_that_fails_is_a_storage_error_that_names_the_shard(server, cache):
    with pytest.raises(StorageError, match=r"cannot read http.*/a\.tar: the server answers 404"):
        cache.pread(put(server, then=status(404)), 0, 10)
    assert unfinished(cache) == []


def test_the_shards_used_longest_ago_are_evicted(server, cache):
    cache.limit = 3 * len(BODY)
    shards = [put(server, f"/{i}.tar", bytes([i]) * len(BODY)) for i in range(4)]
    for age, shard in enumerate(reversed(shards[:3])):
        cache.fetch(shard)
        os.utime(cache.folder / f"{shard.sha256}.tar", ns=(time.time_ns() - (age + 3) * 10**9, STAMP))
    cache.fetch(shards[0])  # the oldest becomes the newest
    cache.fetch(shards[3])
    assert published(cache) == sorted(f"{shards[i].sha256}.tar" for i in (0, 2, 3))


def test_a_shard_in_use_is_never_evicted(server, cache, tmp_path):
    cache.limit = 2 * len(BODY)
    shards = [put(server, f"/{i}.tar", bytes([i]) * len(BODY)) for i in range(3)]
    cache.pread(shards[0], 0, 1)
    other = ShardCache(cache.folder, limit=cache.limit)
    for shard in shards[1:]:
        other.fetch(shard)
    assert published(cache) == sorted(f"{shards[i].sha256}.tar" for i in (0, 2))
    other.pread(shards[2], 0, 1)
    with pytest.raises(StorageError, match=r"no room for a shard of 200000 bytes .* cache_limit allows 400000; raise"):
        other.fetch(shards[1])
    cache.close()
    other.fetch(shards[1])


def test_abandoned_downloads_go_before_shards(server, cache):
    cache.limit = 2 * len(BODY)
    cache.fetch(put(server))
    part = cache.folder / f"{'0' * 64}.tar.{len(BODY)}.part"
    part.write_bytes(b"x")
    cache.fetch(put(server, "/b.tar", BODY[::-1]))
    assert len(published(cache)) == 2
    assert not part.exists()


def test_a_strangers_files_are_not_touched(server, cache):
    cache.limit = len(BODY)
    cache.folder.mkdir(0o700)
    (cache.folder / "thesis.tar").write_bytes(bytes(10**6))
    cache.fetch(put(server))
    assert (cache.folder / "thesis.tar").exists()


def test_a_limit_below_one_shard_says_so(server, cache):
    cache.limit = 1000
    with pytest.raises(StorageError, match="no room for a shard of 200000 bytes"):
        cache.fetch(put(server))
    assert server.count("/a.tar") == 0


def test_a_disk_without_room_counts_like_a_limit(server, cache, monkeypatch):
    full = os.statvfs_result((4096, 4096, 1000, 10, 10, 100, 100, 100, 0, 255))
    monkeypatch.setattr("mim.data.eviction.os.statvfs", lambda _path: full)
    with pytest.raises(StorageError, match="the disk allows"):
        cache.fetch(put(server))


def test_a_disk_that_is_full_is_a_storage_error_and_leaves_nothing(server, cache):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(StorageError, match=r"no space left in .*/a\.tar \(200000 bytes\).*lower train.cache_limit"):
            cache.fetch(put(server))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert published(cache) == unfinished(cache) == []
    cache.fetch(put(server))


def test_a_disk_that_refuses_to_write_is_a_storage_error(server, cache, monkeypatch):
    def fail(*_args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(cache_module.os, "fsync", fail)
    with pytest.raises(StorageError, match=r"cannot keep http.*/a\.tar in .*: Input/output error"):
        cache.fetch(put(server))
    assert published(cache) == []


def test_a_copy_in_another_process_has_the_same_settings(cache):
    cache.limit = 7
    copy = pickle.loads(pickle.dumps(cache))
    assert (copy.folder, copy.limit, copy.remote.patience) == (cache.folder, 7, HASTE)


def test_a_forked_child_does_not_release_its_parents_shards(server, cache):
    cache.limit = len(BODY)
    shard = put(server)
    cache.pread(shard, 0, 1)
    if (child := os.fork()) == 0:
        good = cache.pread(shard, 3, 5) == BODY[3:8]
        cache.close()
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    with pytest.raises(StorageError, match="no room"):
        ShardCache(cache.folder, limit=cache.limit).fetch(put(server, "/b.tar", BODY[::-1]))


# ---- datasets --------------------------------------------------------------------------------------------------------


@pytest.fixture
def remote_dataset(shards, server, tmp_path):
    """A dataset folder whose shards lie on the server."""
    return serve_dataset(server, shards / "train", tmp_path / "dataset")


def read_all(dataset):
    return [dataset.read(shard, row) for shard, count in enumerate(dataset.counts) for row in range(count)]


def test_a_remote_dataset_gives_the_samples_of_the_local_one(shards, remote_dataset, server, tmp_path):
    dataset = Dataset.open(remote_dataset, cache_dir=tmp_path / "cache", cache_limit=10**9)
    assert sum(map(len, server.requests.values())) == 0  # opening asks nobody
    local = Dataset.open(shards / "train")
    assert dataset.id == local.id
    assert read_all(dataset) == read_all(local)
    assert read_all(pickle.loads(pickle.dumps(dataset))) == read_all(local)
    assert {len(requests) for requests in server.requests.values()} == {1}


def test_a_recipe_says_where_remote_shards_are_kept_and_how_many(remote_dataset, tmp_path):
    machine = {"cache_dir": str(tmp_path / "here"), "cache_limit": 0.5}
    dataset, _ = build.open_data({"data": {"path": str(remote_dataset)}, "train": machine})
    assert (dataset.cache.folder, dataset.cache.limit) == (tmp_path / "here" / "shards", 2**29)
    default, _ = build.open_data({"data": {"path": str(remote_dataset)}})
    assert (default.cache.folder, default.cache.limit) == (Path(FOLDER).expanduser(), None)


def test_a_flipped_bit_in_the_cache_is_found_by_the_index_and_fetched_again(shards, remote_dataset, tmp_path, server):
    dataset = Dataset.open(remote_dataset, cache_dir=tmp_path / "cache")
    read_all(dataset)
    for path in (tmp_path / "cache").glob("*.tar"):  # as a disk does it: no time of modification tells
        body = bytearray(path.read_bytes())
        for place in range(700, len(body), 700):
            body[place] ^= 1
        path.write_bytes(body)
        os.utime(path, ns=(STAMP, STAMP))
    assert read_all(dataset) == read_all(Dataset.open(shards / "train"))
    assert {len(requests) for requests in server.requests.values()} == {2}


def test_an_index_that_the_right_shard_contradicts_is_a_data_error(remote_dataset, tmp_path, server):
    index = bytearray((remote_dataset / "shard-00000.npy").read_bytes())
    index[-1] ^= 1  # the CRC32 of the last member
    (remote_dataset / "shard-00000.npy").write_bytes(index)
    dataset = Dataset.open(remote_dataset, cache_dir=tmp_path / "cache")
    with pytest.raises(DataError, match="differs from the index"):
        read_all(dataset)
    assert server.count("/shard-00000.tar") == 1


def test_a_shard_that_is_not_the_one_of_the_lock_is_downloaded_twice_and_no_more(remote_dataset, tmp_path, server):
    path = "/shard-00000.tar"
    server.put(path, server.entries[path].body[::-1])
    with pytest.raises(DataError, match="is not the shard of the lock"):
        read_all(Dataset.open(remote_dataset, cache_dir=tmp_path / "cache"))
    assert server.count(path) == 2


@pytest.mark.slow
def test_a_download_survives_any_number_of_kills(server, cache):
    shard = put(server, then=trickle(100_000))
    fork, rng = multiprocessing.get_context("fork"), random.Random(5)
    for _ in range(20):
        process = fork.Process(target=cache.fetch, args=(shard,))
        process.start()
        process.join(rng.uniform(0, 0.2))
        process.kill()
        process.join()
    assert server.count("/a.tar") > 1
    assert cache.pread(shard, 0, len(BODY)) == BODY
    assert len(published(cache)) == 1
    assert unfinished(cache) == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://me:hunter2@host/a.tar", "credentials do not belong"),
        ("https://host/a.tar?X-Amz-Signature=hunter2", "with a query"),
        ("pipe:cat /etc/passwd", "is refused"),
        ("file:///etc/passwd", "is refused"),
        ("-", "no location"),
    ],
)
def test_a_lock_with_a_location_that_is_refused_opens_nothing(remote_dataset, url, message):
    lock = json.loads((remote_dataset / LOCK).read_text())
    lock["shards"][0]["url"] = url
    (remote_dataset / LOCK).write_text(json.dumps(lock))
    with pytest.raises(ConfigError, match=message) as raised:
        Dataset.open(remote_dataset)
    assert "hunter2" not in str(raised.value)


def test_no_process_is_started_to_read_a_remote_dataset(remote_dataset, tmp_path):
    started = []
    events = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn")
    sys.addaudithook(lambda event, args: started.append(event) if event in events else None)
    read_all(Dataset.open(remote_dataset, cache_dir=tmp_path / "cache"))
    assert started == []
    subprocess.run(["true"], check=True)  # the hook hears
    assert started


def wait_until(fact):
    for _ in range(1000):
        if fact():
            return
        time.sleep(0.01)
    raise AssertionError("it never came true")
