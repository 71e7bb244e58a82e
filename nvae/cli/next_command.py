"""Commands to print: settings quoted as Hydra reads them, words as a shell does."""

import os
import re
from pathlib import Path

from nvae.command_line import shell
from nvae.data import DataConfig
from nvae.data.config import IN_MEMORY_FORMATS, is_known, load_config

_PLAIN = re.compile(r"[\w./:@%+-]+( [\w./:@%+-]+)*", re.ASCII)
"""What Hydra takes without quotes; spaces inside are fine."""


def setting(key: str, value: object) -> str:
    """``key=value`` for Hydra; lists of numbers keep their brackets."""
    text = str(value)
    if isinstance(value, list):
        return f"{key}=[{','.join(f'{entry:g}' for entry in value)}]"
    if _PLAIN.fullmatch(text):
        return f"{key}={text}"
    # backslashes stand for themselves, except before a quote
    quoted = re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + ("\\" + m[2] if m[2] else ""), text)
    return f'{key}="{quoted}"'


def command(script: str, **settings: object) -> str:
    """``python SCRIPT key=value ...`` to paste; None leaves a setting out, ``__`` is a dot."""
    given = {key.replace("__", "."): each for key, each in settings.items() if each is not None}
    return shell("python", script, *(setting(key, each) for key, each in given.items()))


def tensorboard(folder: Path) -> str:
    """To look at a run's curves."""
    return shell("tensorboard", "--logdir", folder)


def root_to_give(data: DataConfig) -> str | None:
    """The folder of the images, where it is not the one that `configs/data` says.

    From a checkpoint comes a data set's name alone, so commands that read its images ask.
    """
    if data.format in IN_MEMORY_FORMATS:
        return None
    is_the_usual = is_known(data.name) and os.path.abspath(
        load_config(data.name).root
    ) == os.path.abspath(data.root)
    return None if is_the_usual else data.root
