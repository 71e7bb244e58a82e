"""The folder that `sample.py` fills: pictures, arrays, and the manifest that says what they are."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from nvae.files import read_json, replacing, write_json
from nvae.pictures import (
    View,
    save_animation,
    save_full_depth,
    save_grids_side_by_side,
    save_image,
    save_rows,
)
from nvae.sampling.grids import Grid

MANIFEST = "manifest.json"


class SampleFolder:
    """Where pictures go; whether it can be written is found out before they are drawn.

    Args:
        path: made when the first file is written.
        request: everything that the pictures depend on.
        overwrite: accept a folder that holds something else; the files of another request go.
        view: what pictures show of an image.

    Raises:
        ValueError: the folder holds something else, or cannot be written.
    """

    def __init__(self, path: Path, request: dict[str, Any], *, overwrite: bool, view: View) -> None:
        self.path, self.request, self.view = path, request, view
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
        if not (self.path / MANIFEST).exists():
            return not any(self.path.iterdir())
        return self._found().get("request") == self.request

    def _found(self) -> dict[str, Any]:
        """The manifest that is there; nothing where there is none that can be read."""
        try:
            found = read_json(self.path / MANIFEST)
        except (ValueError, FileNotFoundError):
            return {}
        return found if isinstance(found, dict) else {}

    def _delete_older(self) -> None:
        """Delete the files of another request, which would pass for some of this one's."""
        found = self._found()
        names = found.get("files")
        if found.get("request") == self.request or not isinstance(names, list):
            return
        # The manifest may be anybody's.
        usable = (name for name in names if isinstance(name, str) and name.isprintable())
        for file in (self.path / name for name in usable):
            inside = file.parent.resolve().is_relative_to(self.path.resolve())
            if inside and (file.is_file() or file.is_symlink()):
                file.unlink()
                if file.parent != self.path and not any(file.parent.iterdir()):
                    file.parent.rmdir()

    def _file(self, name: str) -> Path:
        if not self.files:  # an interrupted request finds its own folder again
            self._delete_older()
            write_json(self.path / MANIFEST, {"request": self.request, "complete": False})
        self.files.append(name)
        return self.path / name

    def grids(self, name: str, grids: list[Tensor], labels: list[str], columns: int | None) -> None:
        """Grids of ``(N, C, H, W)``, from left to right."""
        shown = [self.view(images) for images in grids]
        save_grids_side_by_side(self._file(name), shown, labels, columns)

    def sheet(self, name: str, sheet: Grid) -> None:
        """Labelled rows."""
        rows = [self.view(row) for row in sheet.rows]
        save_rows(self._file(name), rows, sheet.row_labels, sheet.column_labels)

    def animation(self, name: str, frames: Tensor) -> None:
        """Frames ``(N, C, H, W)``, in the format that the name ends in."""
        save_animation(self._file(name), self.view(frames))

    def image(self, name: str, image: Tensor) -> None:
        """One ``(C, H, W)`` image, at its own size."""
        save_image(self._file(name), self.view(image))

    def full_depth(self, name: str, image: Tensor, bits: int) -> None:
        """One ``(C, H, W)`` image with all its bits; the name is without suffix."""
        file = save_full_depth(self._file(name), image, bits)
        self.files[-1] = f"{name}{file.suffix}"

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
