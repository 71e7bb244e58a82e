"""Downloads: torchvision's addresses and checksums; without a network, one line that helps."""

from dataclasses import replace
from urllib.error import URLError

import pytest

from nvae.data.download import download
from nvae.data.manifest import DataError
from nvae.data.prepare import load_config
from nvae.data.sources import prepare
from tests.data.files import pictures, write_chardata, write_idx


@pytest.fixture
def fetched(monkeypatch):
    """Every address asked for; nothing leaves the machine."""
    calls = []
    monkeypatch.setattr(
        "nvae.data.download.tv.download_url",
        lambda url, root, filename=None, md5=None: calls.append((url, filename, md5)),
    )
    monkeypatch.setattr(
        "nvae.data.download.tv.download_file_from_google_drive",
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

    monkeypatch.setattr("nvae.data.download.tv.download_url", flaky)
    download(load_config("mnist"), tmp_path)
    assert len(calls) == 5
    assert calls[0] != calls[1]


@pytest.mark.parametrize("error", [URLError("no network"), OSError("reset"), RuntimeError("md5")])
@pytest.mark.parametrize("name", ["mnist", "cifar10", "omniglot"])
def test_without_a_network_the_folder_and_files_are_named(tmp_path, monkeypatch, name, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("nvae.data.download.tv.download_url", fail)
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
        write_chardata(tmp_path / "made", pictures(9, 28, 1), pictures(4, 28, 1))
        (tmp_path / "made" / "chardata.mat").rename(f"{root}/{filename}")

    monkeypatch.setattr("nvae.data.download.tv.download_url", fetch)
    config = replace(load_config("omniglot"), root=str(tmp_path), train_size=9, test_size=4)
    prepare(config)
    assert [path.name for path in (tmp_path / "source").iterdir()] == ["chardata.mat"]
