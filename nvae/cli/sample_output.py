"""The folder that `sample.py` writes: pictures, arrays, and a manifest to repeat them."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from nvae.files import read_json, replacing, write_json
from nvae.pictures import save_animation, save_grids_side_by_side, save_image, save_rows
from nvae.sampling.grids import Grid

MANIFEST = "manifest.json"


class SampleFolder:
    """Where pictures go; whether it can be written is found out before they are drawn.

    Args:
        path: made when the first file is written.
        request: everything that the pictures depend on.
        overwrite: accept a folder that holds something else.

    Raises:
        ValueError: the folder holds something else, or cannot be written.
    """

    def __init__(self, path: Path, request: dict[str, Any], *, overwrite: bool) -> None:
        self.path, self.request = path, request
        self.files: list[str] = []
        try:
            usable = overwrite or self._is_ours()
            if usable:
                _try_writing(path)
        except OSError as error:
            raise ValueError(
                f"{path} cannot be written: {error.strerror or error}; give output=FOLDER"
            ) from error
        if not usable:
            raise ValueError(
                f"{path} is there already and holds something else; give another output or "
                "overwrite=true"
            )

    def _is_ours(self) -> bool:
        if not self.path.exists():
            return True
        if not self.path.is_dir():
            return False
        manifest = self.path / MANIFEST
        if not manifest.exists():
            return not any(self.path.iterdir())
        try:
            found = read_json(manifest)
        except ValueError:
            return False
        return isinstance(found, dict) and found.get("request") == self.request

    def _file(self, name: str) -> Path:
        if not self.files:  # an interrupted request finds its own folder again
            write_json(self.path / MANIFEST, {"request": self.request, "complete": False})
        self.files.append(name)
        return self.path / name

    def grids(self, name: str, grids: list[Tensor], labels: list[str], columns: int | None) -> None:
        """Grids of ``(N, C, H, W)``, from left to right."""
        save_grids_side_by_side(self._file(name), grids, labels, columns)

    def sheet(self, name: str, sheet: Grid) -> None:
        """Labelled rows."""
        save_rows(self._file(name), sheet.rows, sheet.row_labels, sheet.column_labels)

    def animation(self, name: str, frames: Tensor) -> None:
        """Frames ``(N, C, H, W)``, in the format that the name ends in."""
        save_animation(self._file(name), frames)

    def image(self, name: str, image: Tensor) -> None:
        """One ``(C, H, W)`` image, at its own size."""
        save_image(self._file(name), image)

    def arrays(self, name: str, **arrays: Tensor) -> None:
        """Several arrays as they are."""
        with replacing(self._file(name)) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **{key: value.numpy() for key, value in arrays.items()})  # type: ignore[arg-type]

    def manifest(self, facts: dict[str, Any]) -> None:
        """Write the manifest, last: now the folder is complete."""
        files = sorted(self.files)
        write_json(
            self.path / MANIFEST,
            {"request": self.request, "complete": True, **facts, "files": files},
        )


def _try_writing(folder: Path) -> None:
    """Raise an OSError unless files can be made in ``folder``; what is made for that goes again.

    Other settings may still turn out to be wrong, and then nothing shall be left behind.
    """
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    made: list[Path] = []
    try:
        for each in reversed(missing):
            each.mkdir()
            made.append(each)
        with tempfile.TemporaryFile(dir=folder):
            pass
    finally:
        for each in reversed(made):
            each.rmdir()
