"""CelebA: the official partition decides, file by file."""

import pytest

from nvae.data.manifest import DataError
from nvae.data.readers.celeba import read_celeba
from nvae.data.readers.source import MissingSourceError
from tests.data.files import encoded, pictures, write_celeba


@pytest.mark.parametrize("packed", [True, False])
def test_splits_follow_the_partition_file(tmp_path, make_config, packed):
    images = pictures(6, 8, 3)
    write_celeba(tmp_path, images, [0, 2, 0, 1, 2, 0], packed=packed)
    parts = read_celeba(tmp_path, make_config())
    got = {split: [item.load() for item in part.items()] for split, part in parts.items()}
    rows = {"train": [0, 2, 5], "valid": [3], "test": [1, 4]}
    assert got == {split: [encoded(images[i]) for i in index] for split, index in rows.items()}


@pytest.mark.parametrize("line", ["000001.jpg", "000001.jpg 3", "../x.jpg 0", "a b c"])
def test_a_bad_partition_line_is_named(tmp_path, make_config, line):
    write_celeba(tmp_path, pictures(1, 8, 3), [0])
    (tmp_path / "list_eval_partition.txt").write_text(f"000001.jpg 0\n{line}\n")
    with pytest.raises(DataError, match="line 2"):
        read_celeba(tmp_path, make_config())


def test_a_listed_picture_missing_from_the_archive_is_named(tmp_path, make_config):
    write_celeba(tmp_path, pictures(2, 8, 3), [0, 0], packed=True)
    with (tmp_path / "list_eval_partition.txt").open("a") as file:
        file.write("000009.jpg 0\n")
    with pytest.raises(DataError, match=r"lacks 000009\.jpg"):
        read_celeba(tmp_path, make_config())


@pytest.mark.parametrize("name", ["list_eval_partition.txt", "img_align_celeba"])
def test_missing_files_are_named(tmp_path, make_config, name):
    write_celeba(tmp_path, pictures(1, 8, 3), [0])
    (tmp_path / name).rename(tmp_path / "elsewhere")
    with pytest.raises(MissingSourceError, match=name):
        read_celeba(tmp_path, make_config())
