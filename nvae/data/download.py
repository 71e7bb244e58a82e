"""Fetching source files where a public address exists, through torchvision where it knows one."""

from pathlib import Path
from typing import Any
from urllib.error import URLError

import torchvision
from torchvision.datasets import utils as tv

from nvae.data.config import DataConfig
from nvae.data.manifest import DataError


def by_hand(config: DataConfig, folder: Path) -> str:
    """What to put where, in one line."""
    files = ", ".join(config.files) or "the source files"
    where = f" (from {config.homepage})" if config.homepage else ""
    return f"put {files}{where} into {folder.absolute()}"


def _from_mirrors(data_set: Any, folder: Path) -> None:
    """MNIST and its kin: several files, each on several mirrors."""
    for name, md5 in data_set.resources:
        for last, mirror in enumerate(data_set.mirrors, 1 - len(data_set.mirrors)):
            try:
                tv.download_url(f"{mirror}{name}", str(folder), name, md5)
                break
            except (URLError, OSError):
                if last == 0:
                    raise


def _from_torchvision(name: str, folder: Path) -> None:
    data_set: Any = getattr(torchvision.datasets, name)
    if hasattr(data_set, "resources"):
        _from_mirrors(data_set, folder)
    elif hasattr(data_set, "tgz_md5"):
        tv.download_url(data_set.url, str(folder), data_set.filename, data_set.tgz_md5)
    else:
        for identity, md5, filename in data_set.file_list:
            tv.download_file_from_google_drive(identity, str(folder), filename, md5)


def download(config: DataConfig, folder: Path) -> None:
    """Fetch the source files of a data set into `folder`, checked against known checksums.

    Raises:
        DataError: No public address, no network, or a wrong checksum; the message says which
            files to put where by hand.
    """
    if not config.torchvision and not config.urls:
        raise DataError(f"{config.name} cannot be downloaded: {by_hand(config, folder)}")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if config.torchvision:
            _from_torchvision(config.torchvision, folder)
        for url in config.urls:
            name = url.rpartition("/")[2]
            # Without a known checksum a half-fetched file would pass for a whole one.
            tv.download_url(url, str(folder), f"{name}.partial")
            (folder / f"{name}.partial").replace(folder / name)
    # torchvision reports a wrong checksum, a missing gdown and a full quota as RuntimeError.
    except (URLError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{config.name} could not be downloaded ({reason}): {by_hand(config, folder)}"
        ) from error
