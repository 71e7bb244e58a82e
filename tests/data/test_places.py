"""Where prepared forms go, when they are made again, and how source files are fetched."""

import os
import shutil
from dataclasses import replace
from http.client import IncompleteRead
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest

from nvae.data.config import DataError, load_config
from nvae.data.conversion import picture_names, prepare, prepare_if_missing
from nvae.data.places import download, listing_digest, prepared_folder
from nvae.data.prepare import main
from tests.data.files import (
    idx_bytes,
    open_splits,
    pictures,
    refuse_folder,
    write_chardata,
    write_idx,
    write_pictures,
)


def config_of(root, **overrides):
    return replace(load_config("folder"), root=str(root), image_size=8, **overrides)


def snapshot(folder):
    return {
        path: (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in (folder, *folder.rglob("*"))
    }


def pixels_of(config):
    prepare_if_missing(config)
    return np.concatenate([split.images.numpy() for split in open_splits(config).values()])


def rows(images):
    return sorted(image.tobytes() for image in images)


def stamp(config):
    return (prepared_folder(config) / "manifest.json").stat().st_ino


def test_nothing_is_written_into_the_folder_of_pictures(tmp_path, monkeypatch, capsys):
    """Not even a lock: it may be read-only, or somebody else's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "cats"
    write_pictures(folder, pictures(10, 8, 3))
    before = snapshot(folder)
    config = config_of(folder)
    prepare_if_missing(config)
    open_splits(config)
    assert main([str(folder), "--size", "8"]) == 0
    assert snapshot(folder) == before
    place = prepared_folder(config)
    assert place.parent.parent == tmp_path / "cache" / "nvae" / "data"
    assert place.parent.name.startswith("cats-")
    assert f"prepared in {place}\n" in capsys.readouterr().out


def test_folders_of_one_name_do_not_share_a_place(tmp_path):
    (tmp_path / "a" / "cats").mkdir(parents=True)
    (tmp_path / "link").symlink_to("a")
    one, other = (prepared_folder(config_of(tmp_path / name / "cats")) for name in ("a", "b"))
    assert one != other
    assert prepared_folder(config_of(tmp_path / "link" / "cats")) == one


def test_the_cache_can_be_set(tmp_path):
    write_pictures(tmp_path / "cats", pictures(10, 8, 3))
    config = config_of(tmp_path / "cats", cache=str(tmp_path / "here"))
    prepare_if_missing(config)
    assert (tmp_path / "here") in prepared_folder(config).parents
    assert main([str(tmp_path / "cats"), "--size", "8", "--cache", str(tmp_path / "there")]) == 0
    assert list(tmp_path.glob("there/cats-*/nvae-8x8x3/manifest.json"))


def test_without_a_home_the_cache_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    with pytest.raises(DataError, match=r"set data\.cache=FOLDER"):
        prepared_folder(config_of(tmp_path))


@pytest.mark.parametrize("inside", [True, False])
def test_a_source_apart_from_the_root_is_prepared_in_the_root(tmp_path, inside):
    source = tmp_path / "root" / "source" if inside else tmp_path / "elsewhere"
    write_pictures(source, pictures(10, 8, 3))
    config = config_of(tmp_path / "root", source=None if inside else str(source))
    before = snapshot(source)
    prepare_if_missing(config)
    assert prepared_folder(config) == tmp_path / "root" / "nvae-8x8x3"
    assert snapshot(source) == before


@pytest.mark.parametrize("where", ["folder", "root/source", "data.source"])
def test_pictures_exchanged_under_the_same_names_and_sizes_are_prepared_again(tmp_path, where):
    source = {"folder": tmp_path / "root", "root/source": tmp_path / "root" / "source"}.get(
        where, tmp_path / "elsewhere"
    )
    given = str(source) if where == "data.source" else None
    config = config_of(tmp_path / "root", source=given)
    for seed in (0, 1):
        images = pictures(10, 8, 3, seed=seed)
        source.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(images):
            header = b"P6 8 8 255\n"
            (source / f"{i}.ppm").write_bytes(header + image.tobytes())
            os.utime(source / f"{i}.ppm", ns=(seed, seed))
        assert rows(pixels_of(config)) == rows(images)
        made = stamp(config)
        pixels_of(config)
        assert stamp(config) == made  # once is enough


def test_other_formats_than_pictures_are_compared_too(tmp_path):
    write_idx(tmp_path / "source", pictures(8, 28, 1), pictures(4, 28, 1), compress=False)
    config = replace(
        load_config("fashion_mnist"),
        root=str(tmp_path),
        train_size=8,
        valid_size=0,
        test_size=4,
        download=False,
    )
    first = pixels_of(config)
    path = tmp_path / "source" / "train-images-idx3-ubyte"
    path.write_bytes(idx_bytes(pictures(8, 28, 1, seed=5)))
    os.utime(path, ns=(7, 7))
    assert not np.array_equal(pixels_of(config), first)


def test_a_source_that_is_gone_leaves_the_prepared_form(tmp_path):
    images = pictures(10, 8, 3)
    write_pictures(tmp_path / "source", images)
    config = config_of(tmp_path)
    prepare_if_missing(config)
    made = stamp(config)
    shutil.rmtree(tmp_path / "source")
    for source in (None, str(tmp_path / "source")):
        config = replace(config, source=source)
        assert rows(pixels_of(config)) == rows(images)
        assert stamp(config) == made


def test_what_was_prepared_from_elsewhere_by_hand_stays(tmp_path):
    write_pictures(tmp_path / "root" / "source", pictures(10, 8, 3))
    images = pictures(10, 8, 3, seed=1)
    write_pictures(tmp_path / "elsewhere", images)
    config = config_of(tmp_path / "root")
    prepare(replace(config, source=str(tmp_path / "elsewhere")))
    assert rows(pixels_of(config)) == rows(images)


def test_names_of_pictures_are_those_of_the_source_as_it_was(tmp_path):
    """A wrong name in the row of a score is worse than none."""
    source = tmp_path / "root" / "source"
    write_pictures(source, pictures(10, 8, 3))
    config = config_of(tmp_path / "root")
    prepare(config)
    names = picture_names(config, "train")
    assert set(names) < {path.name for path in source.iterdir()}
    moved = config_of((tmp_path / "root").rename(tmp_path / "moved"))
    assert picture_names(moved, "train") == names
    first = min((tmp_path / "moved" / "source").iterdir())
    first.rename(first.with_name("z.png"))
    assert picture_names(moved, "train") is None
    shutil.rmtree(first.parent)
    first.parent.mkdir()
    assert picture_names(moved, "train") is None


def test_a_manifest_that_is_somebody_elses_is_not_taken_for_ours(tmp_path):
    """Preparing into such a folder would delete its arrays."""
    write_pictures(tmp_path, pictures(10, 8, 3))
    (tmp_path / "manifest.json").write_text('{"assets": []}')
    np.save(tmp_path / "features.npy", np.zeros(3))
    before = snapshot(tmp_path)
    assert main([str(tmp_path), "--size", "8"]) == 0
    assert len(pixels_of(config_of(tmp_path))) == 10
    assert snapshot(tmp_path) == before


def test_a_root_that_is_a_prepared_form_is_opened_as_it_is(tmp_path):
    write_pictures(tmp_path / "cats", pictures(10, 8, 3))
    config = config_of(tmp_path / "cats")
    images = pixels_of(config)
    shutil.copytree(prepared_folder(config), tmp_path / "copy")
    direct = config_of(tmp_path / "copy")
    assert np.array_equal(pixels_of(direct), images)
    (tmp_path / "copy" / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json is no JSON"):
        open_splits(direct)


@pytest.mark.parametrize("name", ["folder", "cifar10"])
def test_an_unprepared_set_says_how_to_prepare_it(tmp_path, name):
    root = tmp_path / "my cats; rm -rf"
    config = replace(load_config(name), root=str(root), image_size=16)
    with pytest.raises(DataError) as error:
        open_splits(config)
    command = f"python -m nvae.data.prepare {name} --root '{root}' --size 16"
    assert str(error.value).endswith(f"run: {command}")


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
    assert listing_digest(tmp_path, kind) == before
    (tmp_path / "a.png").write_bytes(b"two")
    os.utime(tmp_path / "a.png", ns=(1, 1))
    assert listing_digest(tmp_path, kind) != before


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
    before = listing_digest(tmp_path / "set.zip", "folder")
    os.utime(tmp_path / "set.zip", ns=(1, 1))
    assert listing_digest(tmp_path / "set.zip", "folder") != before
    before = listing_digest(tmp_path, "folder")
    (tmp_path / "a.png").symlink_to("nowhere")
    (tmp_path / "b.png").symlink_to("b.png")
    assert listing_digest(tmp_path, "folder") != before


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    write_pictures(tmp_path / "a", pictures(3, 8, 3))
    write_pictures(tmp_path / "b", pictures(3, 8, 3))
    write_pictures(tmp_path / "lost+found", pictures(3, 8, 3))
    refuse_folder(monkeypatch, tmp_path / "lost+found")
    assert sum(split.count for split in prepare(config_of(tmp_path)).splits.values()) == 6
    refuse_folder(monkeypatch, tmp_path / "b")
    for work in (prepare, prepare_if_missing):
        with pytest.raises(DataError, match=r"/b cannot be read: Permission denied"):
            work(config_of(tmp_path))


@pytest.fixture
def fetched(monkeypatch):
    """Every address asked for; nothing leaves the machine."""
    calls = []
    monkeypatch.setattr(
        "torchvision.datasets.utils.download_url",
        lambda url, root, filename=None, md5=None: calls.append((url, filename, md5)),
    )
    monkeypatch.setattr(
        "torchvision.datasets.utils.download_file_from_google_drive",
        lambda identity, root, filename, md5: calls.append((identity, filename, md5)),
    )
    return calls


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "celeba64"])
def test_torchvision_knows_every_file_and_its_checksum(tmp_path, fetched, name):
    config = load_config(name)
    download(config, tmp_path)
    names = {filename for _, filename, _ in fetched}
    assert set(config.files) <= names
    assert all(md5 and len(md5) == 32 for _, _, md5 in fetched)


def test_the_next_mirror_is_tried(tmp_path, monkeypatch):
    calls = []

    def flaky(url, root, filename, md5):
        calls.append(url)
        if len(calls) == 1:
            raise URLError("down")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", flaky)
    download(load_config("mnist"), tmp_path)
    assert len(calls) == 5
    assert calls[0] != calls[1]


@pytest.mark.parametrize(
    "error",
    [
        *(URLError("no network"), OSError("reset"), RuntimeError("md5"), TimeoutError()),
        IncompleteRead(b""),
    ],
)
@pytest.mark.parametrize("name", ["mnist", "cifar10", "omniglot"])
def test_without_a_network_the_folder_and_files_are_named(tmp_path, monkeypatch, name, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fail)
    config = replace(load_config(name), root=str(tmp_path))
    with pytest.raises(DataError) as caught:
        prepare(config)
    message = str(caught.value)
    assert "\n" not in message
    assert str(tmp_path / "source") in message
    assert all(file in message for file in config.files)
    assert (tmp_path / "source").is_dir()


def test_sets_without_a_public_address_say_what_to_fetch(tmp_path):
    config = replace(load_config("celebahq256"), root=str(tmp_path))
    with pytest.raises(DataError, match="celebahq256 cannot be downloaded: put "):
        prepare(config)


def test_files_put_there_by_hand_are_used_and_nothing_is_fetched(tmp_path, fetched):
    write_idx(tmp_path / "source", pictures(9, 28, 1), pictures(4, 28, 1))
    config = replace(load_config("mnist"), root=str(tmp_path), train_size=9, test_size=4)
    prepare(config)
    assert not fetched


def test_a_download_is_used_at_once_and_never_half(tmp_path, monkeypatch):
    def fetch(url, root, filename):
        assert not Path(root, filename).exists()  # torchvision would take it for the whole
        write_chardata(tmp_path / "made", pictures(9, 28, 1), pictures(4, 28, 1))
        (tmp_path / "made" / "chardata.mat").rename(f"{root}/{filename}")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fetch)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "chardata.mat.partial").write_bytes(b"half")  # of a killed download
    config = replace(load_config("omniglot"), root=str(tmp_path), train_size=9, test_size=4)
    prepare(config)
    assert [path.name for path in (tmp_path / "source").iterdir()] == ["chardata.mat"]
