"""From whatever went wrong before work began to one line: what is wrong, what is allowed."""

import dataclasses
import difflib
import os
import re
import sys
import typing
from collections.abc import Callable
from typing import Any

import torch
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from nvae.cli.schema import CONFIGS, lookup, takes_group, unknown_key
from nvae.command_line import fail, interruptible
from nvae.settings import describe_type


class UserError(Exception):
    """Something that the user can put right; the message is one line."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the host's or the device's memory ran out; torch says the former in words only."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        text in str(error)
        for text in ("can't allocate memory", "not enough memory", "calculation overflowed")
    )


def run(
    compose: Callable[[Callable[[DictConfig], None]], None],
    work: Callable[[DictConfig], None],
    schema: type,
) -> None:
    """Compose configurations with Hydra, then work; the user's errors become one line, exit code 2.

    Ctrl-C is one line too, see :func:`interruptible`. The work is done after Hydra has returned: it
    adds lines of its own to every error, and Lightning, when it starts further processes inside a
    Hydra job, looks for Hydra's output folder, which we do not keep.

    Args:
        compose: given a collector, lets ``hydra.main`` call it with every composed configuration
            (several with ``--multirun``).
        work: done with each of them, in order.
        schema: root dataclass of the configuration, for saying what is allowed.
    """
    # Hydra would print its own summary and exit; here it raises instead
    os.environ["HYDRA_FULL_ERROR"] = "1"
    composed: list[DictConfig] = []
    try:
        with interruptible():
            _compose(compose, composed)
            for config in composed:
                work(config)
    except (HydraException, OmegaConfBaseException, UserError) as error:
        raise fail(one_line(error, schema)) from None
    except RecursionError:
        raise fail("settings, or the content of a file, are nested too deep") from None
    except MemoryError:
        raise fail("this machine's memory is not enough") from None


def _compose(
    compose: Callable[[Callable[[DictConfig], None]], None], composed: list[DictConfig]
) -> None:
    """Fill ``composed``; whatever Hydra does not foresee is the command line's fault too."""
    try:
        compose(composed.append)
    except (HydraException, OmegaConfBaseException, RecursionError, MemoryError):
        raise
    except Exception as error:
        groups = {"hydra", *(path.name for path in CONFIGS.iterdir() if path.is_dir())}
        for argument in sys.argv[1:]:
            group, equals, value = argument.partition("=")
            no_name = value == "null" or not re.match(r"[A-Za-z_]", value)
            if equals and no_name and group in groups:
                raise UserError(takes_group(group, value)) from error
        raise UserError(f"the settings cannot be composed: {error}") from error


def one_line(error: BaseException, schema: type) -> str:
    """The message of an error, its cause's where that says more, on one line."""
    if isinstance(error, MissingConfigException):
        return _missing_config(error)
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for link in reversed(chain):
        if isinstance(link, OmegaConfBaseException) and link.full_key:
            return _bad_key(link, schema, [str(each) for each in chain])
    return " ".join(str(error).split()) or type(error).__name__


def _missing_config(error: MissingConfigException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    wanted = (error.missing_cfg_file or "").removesuffix(".yaml")
    group, _, option = wanted.rpartition("/")
    if error.options:
        close = difflib.get_close_matches(option, error.options, 1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        return f"{group}={option} is unknown{hint}; allowed: {', '.join(sorted(error.options))}"
    return " ".join(lines)


def _bad_key(error: OmegaConfBaseException, schema: type, messages: list[str]) -> str:
    key, message = str(error.full_key), " ".join(str(error.msg).partition("full_key:")[0].split())
    path, in_list, _ = key.partition("[")
    holder, unknown = lookup(schema, path)
    if unknown is not None:
        return unknown_key(path, [f.name for f in dataclasses.fields(holder)])
    if "is not in struct" in message and isinstance(error.parent_node, DictConfig):
        return unknown_key(path, [str(name) for name in error.parent_node])
    kind = typing.get_type_hints(holder).get(path.split(".")[-1])
    if "not Optional" in message and not in_list:
        is_group = kind is None  # then the path leads to the holder itself
        return takes_group(path, None) if is_group else f"{key}=null is not {describe_type(kind)}"
    entry = _entry_type(kind)
    if entry is not None and not in_list:
        return _no_list(key, messages)
    found = re.search(r"Value '(.*?)'", str(error.msg), re.DOTALL)
    if in_list and entry is not None:  # no "=": a name such as keep[0] cannot be set
        value = found[1] if found else "null"
        return f"{key}: {value} is not {describe_type(entry)}"
    if kind is not None and found:
        return f"{key}={found[1]} is not {describe_type(kind)}"
    return f"{key}: {message}"


def _entry_type(kind: Any) -> Any:
    """What a list holds, optional or not; None for anything else."""
    for option in (kind, *typing.get_args(kind)):
        if typing.get_origin(option) in (list, tuple):
            return typing.get_args(option)[0]
    return None


def _no_list(key: str, messages: list[str]) -> str:
    """OmegaConf names the value's type only; Hydra's message, further out, has the value."""
    for message in messages:
        written = re.search(rf"override \W*{re.escape(key)}=(.*)", message)
        if written:
            return f"{key}={written[1]} is not a list; write {key}=[{written[1]}]"
    return f"{key} is not a list; write {key}=[...]"
