"""What every command does alike: errors of one line, and Ctrl-C.

It imports nothing heavy, so that Ctrl-C is answered while the rest is still being imported.
"""

import argparse
import re
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

LONGEST_MESSAGE = 500
"""Characters of an error's line; what is longer loses its middle."""

FAILURE = 2
"""Exit code of an error that the user can put right."""

_PLAIN = re.compile(r"[\w./:@%+-]+( [\w./:@%+-]+)*", re.ASCII)
"""What Hydra takes without quotes; spaces inside are fine."""


def brief(message: object, longest: int = LONGEST_MESSAGE) -> str:
    """A message on one line: no addresses of objects, no control characters, not too long."""
    text = str(message)
    if len(text) > 4 * longest:  # before anything is done with it: some are megabytes long
        text = f"{text[: 2 * longest]} {text[-2 * longest :]}"
    text = "".join(each if each.isprintable() else " " for each in text)
    text = " ".join(re.sub(r" (?:object )?at 0x[0-9a-fA-F]+", "", text).split())
    if len(text) <= longest:
        return text
    head = longest * 2 // 3
    return f"{text[:head]} ... {text[len(text) - (longest - head - 5) :]}"


def shell(*words: object) -> str:
    """A command to print: every word quoted as a shell needs it."""
    return shlex.join(map(str, words))


def setting(key: str, value: object) -> str:
    """``key=value`` for Hydra; lists of numbers, or of names of Python, keep their brackets."""
    text = str(value)
    if isinstance(value, list):
        entries = (entry if isinstance(entry, str) else f"{entry:g}" for entry in value)
        return f"{key}=[{','.join(entries)}]"
    if _PLAIN.fullmatch(text):
        return f"{key}={text}"
    # backslashes stand for themselves, except before a quote
    quoted = re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + ("\\" + m[2] if m[2] else ""), text)
    return f'{key}="{quoted}"'


def fail(message: object) -> SystemExit:
    """Print the line of an error; raise what is returned."""
    print(f"error: {brief(message)}", file=sys.stderr)
    return SystemExit(FAILURE)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like every other."""

    def error(self, message: str) -> NoReturn:
        """Print the line and exit."""
        raise fail(f"{message}; {self.prog} --help lists what there is")


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C in the block becomes one line and exit code 130, the shell's for this signal."""
    try:
        yield
    except KeyboardInterrupt:
        # a second Ctrl-C, while Python is cleaning up, ends it at once and prints nothing
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        print("interrupted; run the same command again", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
