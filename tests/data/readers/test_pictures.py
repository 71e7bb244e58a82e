"""Folders and archives of pictures, and CelebA: which files, which order, split and damage."""

import tarfile
import zipfile

import pytest

from nvae.data.config import DataError
from nvae.data.pixels import BadImageError
from nvae.data.readers import MissingSourceError, read_source
from nvae.data.readers.pictures import tar_listing, zip_items
from nvae.data.readers.splits import group_by_split, split_of_word
from tests.data.files import add_to_tar, encoded, pictures, write_celeba, write_pictures


def names(parts):
    return {split: [item.name for item in part.items()] for split, part in parts.items()}


def test_pictures_anywhere_below_sorted_and_nothing_else(tmp_path, make_config):
    write_pictures(tmp_path / "b", pictures(2, 4, 3))
    write_pictures(tmp_path / "a" / "deep", pictures(1, 4, 3), "webp")
    write_pictures(tmp_path / ".hidden", pictures(1, 4, 3))
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "._b.png").write_bytes(b"resource fork")
    assert names(read_source(tmp_path, "folder", make_config())) == {
        "train": ["a/deep/0000.webp", "b/0000.png", "b/0001.png"]
    }


@pytest.mark.parametrize(
    ("word", "split"),
    [
        ("train", "train"),
        ("train_32x32", "train"),
        ("valid_32x32", "valid"),
        ("val", "valid"),
        ("Validation", "valid"),
        ("test", "test"),
        ("trainer", None),
        ("valley", None),
        ("cats", None),
    ],
)
def test_words_that_name_a_split(word, split):
    assert split_of_word(word) == split


def test_splits_only_where_every_picture_has_one():
    assert group_by_split(["train/a.png", "val/b.png"]) == {"train": [0], "valid": [1]}
    assert group_by_split(["x/train/a.png", "x/test/b.png"]) == {"train": [0], "test": [1]}
    # A class called "test" beside others is a class.
    assert group_by_split(["cats/a.png", "test/b.png"]) == {"train": [0, 1]}
    assert group_by_split(["val/a.png", "test/b.png"]) == {"train": [0, 1]}
    assert group_by_split(["test.png"]) == {"train": [0]}


def test_older_imagenet_as_unpacked_and_as_packed(tmp_path, make_config):
    for split, n in (("train", 3), ("valid", 2)):
        write_pictures(tmp_path / "loose" / f"{split}_32x32", pictures(n, 4, 3))
        (tmp_path / "packed").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / "packed" / f"{split}_32x32.tar", "w") as tar:
            tar.add(tmp_path / "loose" / f"{split}_32x32", f"{split}_32x32")
    loose = read_source(tmp_path / "loose", "folder", make_config())
    packed = read_source(tmp_path / "packed", "folder", make_config())
    assert {split: part.count for split, part in loose.items()} == {"train": 3, "valid": 2}
    for split in loose:
        assert sorted(i.load().picture for i in loose[split].items()) == sorted(
            i.load().picture for i in packed[split].items()
        )


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz", ".tar.xz"])
def test_archives_are_read_in_place(tmp_path, make_config, suffix):
    images = [encoded(p) for p in pictures(3, 4, 3)]
    path = tmp_path / f"set{suffix}"
    members = {f"dir/{i}.png": data for i, data in enumerate(images)} | {"dir/readme.txt": b"x"}
    if suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(path, f"w:{suffix[5:]}") as tar:
            for name, data in members.items():
                add_to_tar(tar, name, data)
    part = read_source(path, "folder", make_config())["train"]
    assert [item.load().picture for item in part.items()] == images
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["../evil.png", "/evil.png", "a/../../evil.png", "..\\evil.png"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archives_with_paths_that_lead_outside_are_refused(tmp_path, make_config, name, kind):
    folder = tmp_path / "in"
    folder.mkdir()
    if kind == "zip":
        with zipfile.ZipFile(folder / "set.zip", "w") as archive:
            archive.writestr(name, b"x")
    else:
        with tarfile.open(folder / "set.tar", "w") as tar:
            add_to_tar(tar, name, b"x")
    with pytest.raises(DataError, match="leads out of the archive"):
        read_source(folder, "folder", make_config())
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_links_in_a_tar_are_not_followed(tmp_path, make_config):
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        add_to_tar(tar, "real.png", b"x")
    assert names(read_source(tmp_path, "folder", make_config())) == {"train": ["real.png"]}


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz"])
@pytest.mark.parametrize("content", [b"", b"rubbish" * 100])
def test_a_damaged_archive_is_named(tmp_path, make_config, suffix, content):
    (tmp_path / f"set{suffix}").write_bytes(content)
    with pytest.raises(DataError, match=r"is damaged|no pictures"):
        read_source(tmp_path, "folder", make_config())


def test_a_damaged_member_of_a_zip_is_one_bad_picture(tmp_path, make_config):
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", b"A" * 100)
        archive.writestr("b.png", b"B" * 100)
    path.write_bytes(path.read_bytes().replace(b"A" * 100, b"A" * 99 + b"x"))
    first, second = read_source(path, "folder", make_config())["train"].items()
    with pytest.raises(BadImageError, match="CRC"):
        first.load()
    assert second.load().picture == b"B" * 100


@pytest.mark.parametrize("files", [[], ["notes.txt"]])
def test_a_folder_without_pictures_is_named(tmp_path, make_config, files):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(MissingSourceError, match=r"no pictures found in .*looked for .png"):
        read_source(tmp_path, "folder", make_config())


def test_links_to_folders_are_named_where_nothing_else_is_found(tmp_path, make_config):
    write_pictures(tmp_path / "there", pictures(2, 4, 3))
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "there")
    with pytest.raises(MissingSourceError, match=r"links to folders are not followed, .*/link is"):
        read_source(tmp_path / "here", "folder", make_config())


def test_a_missing_folder_is_named(tmp_path, make_config):
    with pytest.raises(MissingSourceError, match="does not exist"):
        read_source(tmp_path / "nowhere", "folder", make_config())


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
        tar_listing(path)


@pytest.mark.parametrize("keep", [1536 * 2, 1536 * 2 + 100, 1536 * 2 + 512, 1536 * 2 + 700])
def test_a_tar_that_is_cut_short_is_not_a_shorter_one(tmp_path, keep):
    path = tar(tmp_path / "a.tar")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="is damaged"):
        tar_listing(path)


@pytest.mark.parametrize("mode", ["w:gz", "w:xz", "w:bz2"])
def test_the_checksum_at_the_end_of_a_packed_tar_is_compared(tmp_path, mode):
    path = tar(tmp_path / "a.tar.x", mode)
    assert len(tar_listing(path)[0]) == 5
    data = bytearray(path.read_bytes())
    data[-6 if mode == "w:gz" else -16] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="is damaged"):
        tar_listing(path)


def test_a_damaged_name_in_a_zip_drops_no_picture(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(3):
            archive.writestr(f"{i}.png", b"x")
        archive.writestr("readme.txt", b"x")
        archive.writestr("folder/", b"")
    assert len(zip_items(path)) == 3
    data = path.read_bytes()
    at = data.rindex(b"1.png")
    path.write_bytes(data[:at] + b"1.pnf" + data[at + 5 :])
    with pytest.raises(DataError, match="is damaged"):
        zip_items(path)


@pytest.mark.parametrize("packed", [True, False])
def test_splits_follow_the_partition_file(tmp_path, make_config, packed):
    images = pictures(6, 8, 3)
    write_celeba(tmp_path, images, [0, 2, 0, 1, 2, 0], packed=packed)
    parts = read_source(tmp_path, "celeba", make_config())
    got = {split: [item.load().picture for item in part.items()] for split, part in parts.items()}
    rows = {"train": [0, 2, 5], "valid": [3], "test": [1, 4]}
    assert got == {split: [encoded(images[i]) for i in index] for split, index in rows.items()}


@pytest.mark.parametrize("line", ["000001.jpg", "000001.jpg 3", "../x.jpg 0", "a b c"])
def test_a_bad_partition_line_is_named(tmp_path, make_config, line):
    write_celeba(tmp_path, pictures(1, 8, 3), [0])
    (tmp_path / "list_eval_partition.txt").write_text(f"000001.jpg 0\n{line}\n")
    with pytest.raises(DataError, match="line 2"):
        read_source(tmp_path, "celeba", make_config())


def test_a_listed_picture_missing_from_the_archive_is_named(tmp_path, make_config):
    write_celeba(tmp_path, pictures(2, 8, 3), [0, 0], packed=True)
    with (tmp_path / "list_eval_partition.txt").open("a") as file:
        file.write("000009.jpg 0\n")
    with pytest.raises(DataError, match=r"lacks 000009\.jpg"):
        read_source(tmp_path, "celeba", make_config())


@pytest.mark.parametrize("name", ["list_eval_partition.txt", "img_align_celeba"])
def test_missing_files_are_named(tmp_path, make_config, name):
    write_celeba(tmp_path, pictures(1, 8, 3), [0])
    (tmp_path / name).rename(tmp_path / "elsewhere")
    with pytest.raises(MissingSourceError, match=name):
        read_source(tmp_path, "celeba", make_config())
