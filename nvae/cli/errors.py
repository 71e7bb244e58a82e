"""From whatever went wrong before work began to one line: what is wrong, what is allowed."""

import dataclasses
import difflib
import os
import re
import sys
import typing
from collections.abc import Callable

from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from nvae.cli.schema import describe_type, lookup, unknown_key


class UserError(Exception):
    """Something that the user can put right; the message is one line."""


def run(
    compose: Callable[[Callable[[DictConfig], None]], None],
    work: Callable[[DictConfig], None],
    schema: type,
) -> None:
    """Compose configurations with Hydra, then work; the user's errors become one line, exit code 2.

    The work is done after Hydra has returned: it adds lines of its own to every error, and
    Lightning, when it starts further processes inside a Hydra job, looks for Hydra's output folder,
    which we do not keep.

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
        compose(composed.append)
        for config in composed:
            work(config)
    except (HydraException, OmegaConfBaseException, UserError) as error:
        print(f"error: {one_line(error, schema)}", file=sys.stderr)
        raise SystemExit(2) from None


def one_line(error: BaseException, schema: type) -> str:
    """The message of an error, its cause's where that says more, on one line."""
    if isinstance(error, MissingConfigException):
        return _missing_config(error)
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for link in reversed(chain):
        if isinstance(link, OmegaConfBaseException) and link.full_key:
            return _bad_key(link, schema)
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


def _bad_key(error: OmegaConfBaseException, schema: type) -> str:
    key = str(error.full_key)
    holder, unknown = lookup(schema, key)
    if unknown is not None:
        return unknown_key(key, [f.name for f in dataclasses.fields(holder)])
    field = key.split(".")[-1]
    kind = typing.get_type_hints(holder).get(field)
    found = re.search(r"Value '(.*?)'", str(error.msg or ""), re.DOTALL)
    if kind is not None and found:
        return f"{key}={found[1]} is not {describe_type(kind)}"
    return f"{key}: {' '.join(str(error.msg).split())}"
