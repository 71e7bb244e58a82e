"""Whether a source changed: by names, sizes and times, and by nothing else."""

import os

import pytest

from nvae.data.listing import is_unchanged, listing_digest
from tests.data.files import pictures, write_pictures


def test_the_digest_sees_a_picture_added_and_nothing_else(tmp_path):
    write_pictures(tmp_path, pictures(2, 4, 3))
    before = listing_digest(tmp_path, "folder")
    (tmp_path / "manifest.json").touch()
    (tmp_path / ".hidden.png").touch()
    assert listing_digest(tmp_path, "folder") == before
    write_pictures(tmp_path / "more", pictures(1, 4, 3))
    assert listing_digest(tmp_path, "folder") != before


@pytest.mark.parametrize("kind", ["folder", "idx"])
def test_pictures_exchanged_under_the_same_names_and_sizes_are_seen(tmp_path, kind):
    (tmp_path / "a.png").write_bytes(b"one")
    before = listing_digest(tmp_path, kind)
    assert is_unchanged(tmp_path, kind, before)
    (tmp_path / "a.png").write_bytes(b"two")
    os.utime(tmp_path / "a.png", ns=(1, 1))
    assert not is_unchanged(tmp_path, kind, before)


def test_digests_of_earlier_versions_compare_names_and_sizes(tmp_path):
    write_pictures(tmp_path, pictures(2, 4, 3))
    before = listing_digest(tmp_path, "folder", times=False)
    os.utime(tmp_path / "0000.png", ns=(1, 1))
    assert is_unchanged(tmp_path, "folder", before)
    assert is_unchanged(tmp_path, "folder", "")
    (tmp_path / "0000.png").unlink()
    assert not is_unchanged(tmp_path, "folder", before)


def test_what_is_written_beside_a_source_does_not_change_it(tmp_path):
    """Else it would be prepared again at every start."""
    (tmp_path / "a.tfrecord").write_bytes(b"x")
    before = listing_digest(tmp_path, "tfrecord")
    prepared = tmp_path / "nvae-8x8x3-random"
    prepared.mkdir()
    (prepared / "manifest.json").touch()
    (prepared / "train.npy").touch()
    (tmp_path / "lock.mdb").touch()
    (tmp_path / ".lock").touch()
    assert listing_digest(tmp_path, "tfrecord") == before


def test_a_single_file_and_links_that_lead_nowhere(tmp_path):
    (tmp_path / "set.zip").write_bytes(b"x")
    assert is_unchanged(
        tmp_path / "set.zip", "folder", listing_digest(tmp_path / "set.zip", "folder")
    )
    before = listing_digest(tmp_path, "folder")
    (tmp_path / "a.png").symlink_to("nowhere")
    (tmp_path / "b.png").symlink_to("b.png")
    assert listing_digest(tmp_path, "folder") != before
