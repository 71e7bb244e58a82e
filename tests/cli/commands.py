"""Run a command in this process, as its script would."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest


class Commands:
    """Runs one command's ``main`` with arguments; ``fails`` returns its single error line."""

    def __init__(
        self, main: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capsys, folder: Path
    ) -> None:
        self._main, self._monkeypatch, self._capsys = main, monkeypatch, capsys
        monkeypatch.chdir(folder)

    def __call__(self, *arguments: object) -> str:
        self._monkeypatch.setattr(sys, "argv", ["command.py", *map(str, arguments)])
        self._main()
        return self._capsys.readouterr().out

    def fails(self, *arguments: object) -> str:
        with pytest.raises(SystemExit) as stopped:
            self(*arguments)
        assert stopped.value.code not in (0, None)
        error = self._capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error
