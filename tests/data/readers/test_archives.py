"""Archives whose damage their own readers pass over."""

import tarfile
import zipfile

import pytest

from nvae.data.manifest import DataError
from nvae.data.readers.archives import tar_names, zip_items
from nvae.data.readers.folder import is_picture
from tests.data.files import add_to_tar


def tar(path, mode="w"):
    with tarfile.open(path, mode) as archive:
        for i in range(5):
            add_to_tar(archive, f"{i}.png", b"x" * 600)
    return path


def test_a_damaged_header_in_the_middle_is_not_the_end(tmp_path):
    """tarfile would give the pictures before it, and not a word."""
    path = tar(tmp_path / "a.tar")
    data = bytearray(path.read_bytes())
    data[1536 * 2 + 3] ^= 1
    path.write_bytes(data)
    with tarfile.open(path) as archive:
        assert len(archive.getnames()) == 2
    with pytest.raises(DataError, match="something other than a header at byte 3072"):
        tar_names(path, is_picture)


@pytest.mark.parametrize("keep", [1536 * 2, 1536 * 2 + 100, 1536 * 2 + 512, 1536 * 2 + 700])
def test_a_tar_that_is_cut_short_is_not_a_shorter_one(tmp_path, keep):
    path = tar(tmp_path / "a.tar")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="is damaged"):
        tar_names(path, is_picture)


@pytest.mark.parametrize("mode", ["w:gz", "w:xz", "w:bz2"])
def test_the_checksum_at_the_end_of_a_packed_tar_is_compared(tmp_path, mode):
    path = tar(tmp_path / "a.tar.x", mode)
    assert len(tar_names(path, is_picture)) == 5
    data = bytearray(path.read_bytes())
    data[-6 if mode == "w:gz" else -16] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="is damaged"):
        tar_names(path, is_picture)


def test_a_damaged_name_in_a_zip_drops_no_picture(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(3):
            archive.writestr(f"{i}.png", b"x")
        archive.writestr("readme.txt", b"x")
        archive.writestr("folder/", b"")
    assert len(zip_items(path, is_picture)) == 3
    data = path.read_bytes()
    at = data.rindex(b"1.png")
    path.write_bytes(data[:at] + b"1.pnf" + data[at + 5 :])
    with pytest.raises(DataError, match="is damaged"):
        zip_items(path, is_picture)
