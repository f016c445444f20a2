import gzip
import tarfile
import zlib

import pytest

from mim.contracts import DataError
from mim.data import tar
from tests.tiny import write_tar


def write_special(path, kind, **fields):
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("x.jpg")
        info.type = kind
        for name, value in fields.items():
            setattr(info, name, value)
        archive.addfile(info)
    return path


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_agree_with_tarfile_in_every_format(tmp_path, format):
    names = ["a.jpg", "folder/b.cls", "ä/" + "long" * 20 + "/" + "name" * 20 + ".png"]
    contents = [(name, bytes([i]) * (700 * i)) for i, name in enumerate(names)]
    path = write_tar(tmp_path / "x.tar", contents, format)
    with tarfile.open(path) as archive:
        expected = [(m.name, m.offset_data, m.size) for m in archive]
    scanned = list(tar.scan(path))
    assert [member[:3] for member in scanned] == expected
    assert [member.crc32 for member in scanned] == [zlib.crc32(data) for _, data in contents]


def test_the_header_before_the_data_holds_the_name(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("folder/" + "n" * 90 + ".jpg", b"1"), ("b.jpg", b"2")], tarfile.USTAR_FORMAT)
    for member in tar.scan(path):
        header = path.read_bytes()[member.offset - tar.BLOCK : member.offset]
        assert tar.name_of(header) == member.name


def test_folders_are_passed_over(tmp_path):
    path = write_special(tmp_path / "x.tar", tarfile.DIRTYPE)
    assert list(tar.scan(path)) == []


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        (tarfile.SYMTYPE, "symbolic link"),
        (tarfile.LNKTYPE, "hard link"),
        (tarfile.CHRTYPE, "device"),
        (tarfile.FIFOTYPE, "pipe"),
        (tarfile.GNUTYPE_SPARSE, "sparse"),
    ],
)
def test_what_is_not_a_plain_file_is_refused(tmp_path, kind, word):
    with pytest.raises(DataError, match=f"byte 0: .*{word}"):
        list(tar.scan(write_special(tmp_path / "x.tar", kind, linkname="/etc/passwd")))


def test_a_sparse_file_in_a_pax_record_is_refused(tmp_path):
    with pytest.raises(DataError, match="sparse"):
        list(tar.scan(write_special(tmp_path / "x.tar", tarfile.REGTYPE, pax_headers={"GNU.sparse.major": "1"})))


@pytest.mark.parametrize("name", ["/etc/x.jpg", "a/../../x.jpg"])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    with pytest.raises(DataError, match="absolute"):
        list(tar.scan(write_tar(tmp_path / "x.tar", [(name, b"")], tarfile.USTAR_FORMAT)))


def test_a_huge_extension_record_is_refused(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("n" * 70_000, b"")], tarfile.GNU_FORMAT)
    with pytest.raises(DataError, match="long-name record"):
        list(tar.scan(path))


def test_truncation_is_refused_wherever_it_cuts(tmp_path):
    whole = write_tar(tmp_path / "x.tar", [("a.jpg", b"1" * 1000), ("b.jpg", b"2" * 1000)]).read_bytes()
    content = 2 * (512 + 1024)
    for length in (0, 100, 512, 1000, 1536, 2000, content, content + 512):
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        with pytest.raises(DataError, match="truncated"):
            list(tar.scan(tmp_path / "cut.tar"))
    (tmp_path / "cut.tar").write_bytes(whole[: content + 1024])
    assert len(list(tar.scan(tmp_path / "cut.tar"))) == 2


def test_a_damaged_header_is_named_with_its_offset(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"1"), ("b.jpg", b"2")])
    damaged = bytearray(path.read_bytes())
    damaged[1024] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"x\.tar, byte 1024: .*checksum"):
        list(tar.scan(path))


def test_compression_is_refused_with_a_remedy(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(gzip.compress(write_tar(path, [("a.jpg", b"1")]).read_bytes()))
    with pytest.raises(DataError, match="gunzip"):
        list(tar.scan(path))


def test_members_hidden_behind_the_end_are_refused(tmp_path):
    one = write_tar(tmp_path / "x.tar", [("a.jpg", b"1")]).read_bytes()
    (tmp_path / "two.tar").write_bytes(one + one)
    with pytest.raises(DataError, match="concatenated"):
        list(tar.scan(tmp_path / "two.tar"))
