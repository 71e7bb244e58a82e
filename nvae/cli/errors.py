"""A command as Hydra's task; what goes wrong becomes one line: what is wrong, what is allowed."""

import dataclasses
import hashlib
import os
import re
import signal
import sys
import traceback
import typing
from collections.abc import Callable
from typing import Any

import hydra
import torch
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nvae.cli.schema import lookup, takes_group
from nvae.command_line import FAILURE, brief, fail, interruptible, setting, shell
from nvae.settings import CONFIGS, describe_type, did_you_mean, unknown_key

LONGEST_JOB_NAME = 120
"""Characters of the name of a job's folder, a hash apart."""

_KEY = re.compile(r"[~+]*[\w./@:$-]+", re.ASCII)
_OPENING = ("[", "{", "'", '"', "${")
"""How a list, a group, a quoted text or an interpolation begins."""

_OPEN_GROUPS = ("callbacks", "logger")
"""Groups that take entries of any name."""

_CLASS = re.compile(r"^class=")
"""What users write; no field of a dataclass can be called so."""

_EXCLUDED = "hydra.job.config.override_dirname.exclude_keys"

Work = Callable[[DictConfig], float | None]


class UserError(Exception):
    """Something that the user can put right; the message is one line."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the host's or the device's memory ran out; torch says the former in words only."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        text in str(error)
        for text in ("can't allocate memory", "not enough memory", "calculation overflowed")
    )


_BOUNDS_MEMORY = {
    "sample": "batch_size",
    "evaluate": "chunk or sample_batch_size",
    "compress": "batch_size",
    "decompress": "batch_size when it is compressed",
}


class JobFailedError(Exception):
    """One job of several went wrong, and has said so."""


def run(name: str, work: Work, schema: type) -> None:
    """Compose `configs/NAME.yaml` with the command line and let Hydra do the work, once or often.

    The user's errors become one line and exit code 2; Ctrl-C is one line too, see
    :func:`interruptible`.

    Args:
        name: of the root configuration.
        work: done with every composed configuration; returns what a sweep optimizes, if anything.
        schema: root dataclass of the configuration, for saying what is allowed.
    """
    # Hydra would print its own summary and exit; here it raises instead
    os.environ["HYDRA_FULL_ERROR"] = "1"
    task = Task(work, schema, sys.argv)
    sys.path.append(os.getcwd())  # for a class of the user's own; nothing of ours is shadowed
    try:
        with interruptible():
            words = [_CLASS.sub("classes=", word) for word in sys.argv[1:]]
            sys.argv = [sys.argv[0], *_with_names_of_jobs(words)]
            hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=name)(task)()
    except JobFailedError:
        raise SystemExit(FAILURE) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise fail(one_line(error, schema)) from None
    except RecursionError:
        raise fail(_TOO_DEEP) from None
    except MemoryError:
        raise fail(_NO_MEMORY) from None
    except BrokenPipeError:  # `| head` has read enough; Python flushes once more at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    except Exception as error:  # whatever Hydra does not foresee is the command line's fault too
        raise fail(_not_composed(error)) from None


def run_command(name: str, work: Callable[[DictConfig], None], schema: type) -> None:
    """:func:`run` for the commands that take a checkpoint.

    Args:
        name: of the root configuration.
        work: what to do; its ValueErrors and OSErrors are the input's fault, and running out of
            memory is told with what to lower.
        schema: of the configuration, which names it ``NAME_schema``.
    """

    def checked(config: DictConfig) -> None:
        try:
            work(config)
        except (ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
            raise UserError(brief(error)) from error
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"the device's memory is not enough; lower {_BOUNDS_MEMORY[name]}"
            ) from error

    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    run(name, checked, schema)


class Task:
    """What Hydra calls with every composed configuration.

    Nothing but ``JobFailedError`` and what ends the process leaves it: to any other exception Hydra
    adds lines of its own. Launchers pickle it to run a job in another process.

    Args:
        work: see :func:`run`.
        schema: see :func:`run`.
        argv: of the command, which the process of a job has again.
    """

    def __init__(self, work: Work, schema: type, argv: list[str]) -> None:
        self._work, self._schema, self._argv = work, schema, argv

    def __call__(self, composed: DictConfig) -> float | None:
        """Do the work.

        Raises:
            JobFailedError: in a sweep, which may go on.
            SystemExit: otherwise.
        """
        job = HydraConfig.get()
        in_sweep = job.mode == RunMode.MULTIRUN
        sys.argv = self._argv
        try:
            return self._work(composed)
        except (HydraException, OmegaConfBaseException, UserError) as error:
            line = one_line(error, self._schema)
        except RecursionError:
            line = _TOO_DEEP
        except MemoryError:
            line = _NO_MEMORY
        except SystemExit as end:
            if in_sweep and end.code in (1, FAILURE):  # and not a signal
                raise JobFailedError from None
            raise
        except Exception as error:
            traceback.print_exception(error)
            raise (JobFailedError() if in_sweep else SystemExit(1)) from None
        if not in_sweep:
            raise fail(line)
        fail(f"job {job.job.num} ({job.job.override_dirname}): {line}")
        raise JobFailedError


_TOO_DEEP = "settings, or the content of a file, are nested too deep"
_NO_MEMORY = "this machine's memory is not enough"


def config_folders() -> list[str]:
    """What the command line says about where configurations are, for another command."""
    given = vars(get_args_parser().parse_args(sys.argv[1:]))
    options = ("config_path", "config_name", "config_dir")
    return [f"--{name.replace('_', '-')}={given[name]}" for name in options if given[name]]


def _with_names_of_jobs(words: list[str]) -> list[str]:
    """The command line with Hydra's setting that names a job by what only some jobs have."""
    overrides = get_args_parser().parse_args(words).overrides
    try:
        given = OverridesParser.create().parse_overrides(overrides)
    except HydraException:  # which Hydra will raise again
        return words
    keys = {each.key_or_group: each.is_sweep_override() for each in given}
    if _EXCLUDED in keys:
        return words
    shared = [key for key, swept in keys.items() if not swept]
    setting = f"{_EXCLUDED}=[{','.join(['resume', 'runs_dir', *shared])}]"
    where = words.index(overrides[0]) if overrides else len(words)  # argparse wants them together
    return [*words[:where], setting, *words[where:]]


def folder_name(overrides: str) -> str:
    """A job's overrides as the name of its folder, which neither a shell nor Hydra has to quote.

    What had to be changed gets a few digits of a hash, so that no two jobs share a folder.
    """
    name = re.sub(r"[^\w.+-]+", "_", overrides, flags=re.ASCII)[:LONGEST_JOB_NAME] or "job"
    if name in (overrides, "job"):
        return name
    return f"{name}-{hashlib.sha256(overrides.encode()).hexdigest()[:8]}"


# wherever a launcher unpickles a task, this module is imported before the folder is looked for
OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)


def _not_composed(error: Exception) -> str:
    groups = {"hydra", *(path.name for path in CONFIGS.iterdir() if path.is_dir())}
    for argument in sys.argv[1:]:
        group, equals, value = argument.partition("=")
        no_name = value == "null" or not re.match(r"[A-Za-z_]", value)
        if equals and no_name and group in groups:
            return takes_group(group, value)
    return f"the settings cannot be composed: {error}"


def one_line(error: BaseException, schema: type) -> str:
    """The message of an error, its cause's where that says more, on one line."""
    if isinstance(error, MissingConfigException):
        return _missing_config(error)
    if isinstance(error, OverrideParseException):
        return _misread(error.override)
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for link in reversed(chain):
        if isinstance(link, OmegaConfBaseException) and link.full_key:
            return _bad_key(link, schema, [str(each) for each in chain])
    return _commas(str(error)) or " ".join(str(error).split()) or type(error).__name__


def _commas(message: str) -> str | None:
    """What to write where Hydra takes a value with commas for the values of several jobs."""
    found = re.match(r"Ambiguous value for argument '([^=]+)=(.*)'\n", message)
    if found is None:
        return None
    key, value = found.groups()
    text, values = shell(f'{key}="{value}"'), shell(f"{key}=[{value}]")
    return f"{key}={value} has commas: write {text}, for a list {values}; -m makes a run of each"


def _misread(override: str) -> str:
    """What to write where Hydra's grammar means something else by the characters of a value."""
    key, equals, value = override.partition("=")
    if not equals or not _KEY.fullmatch(key):
        return f"{override} is no setting: write SETTING=VALUE"
    if value.startswith(_OPENING):
        example = shell(f'{key}=["a=b.ckpt"]')
        return (
            f"{override} cannot be read: what opens must close, and inside a list or group text "
            f"with other signs than - _ . / : @ % + takes quotes: {example}"
        )
    return f"{override} has signs that Hydra takes for its own: write {shell(setting(key, value))}"


def _missing_config(error: MissingConfigException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    wanted = (error.missing_cfg_file or "").removesuffix(".yaml")
    group, _, option = wanted.rpartition("/")
    if error.options and group == "recipe" and f"recipe={option}" not in sys.argv:
        return (
            f"data={option} says nothing of a network and epochs that fit it: give recipe=..., "
            f"allowed: {', '.join(sorted(error.options))}; or write recipe/{option}.yaml"
        )
    if error.options:
        hint = did_you_mean(option, error.options)
        if group in ("hydra/sweeper", "hydra/launcher"):
            hint += ", or not installed: pip install 'nvae[sweep]'"
        return f"{group}={option} is unknown{hint}; allowed: {', '.join(sorted(error.options))}"
    return " ".join(lines)


def _bad_key(error: OmegaConfBaseException, schema: type, messages: list[str]) -> str:
    key, message = str(error.full_key), " ".join(str(error.msg).partition("full_key:")[0].split())
    path, in_list, _ = key.partition("[")
    outside = [f.name for f in dataclasses.fields(schema)]
    if "is not in struct" in message and isinstance(error.parent_node, DictConfig):
        line = unknown_key(path, [str(name) for name in error.parent_node])
        is_entry = path.rpartition(".")[0] in _OPEN_GROUPS
        return f"{line}; +{path}._target_=... adds one" if is_entry else line
    held_by = error.object_type  # what holds the key
    if held_by is list and isinstance(error.parent_node, ListConfig):
        held_by = OmegaConf.get_type(error.parent_node._get_parent())  # the list's own holder
    if dataclasses.is_dataclass(held_by):
        schema, name = typing.cast(type, held_by), path.rpartition(".")[2]
    else:
        name = path
    holder, unknown = lookup(schema, name)
    if unknown is not None:
        if unknown in outside:
            return f"unknown key {path}: {unknown} is in no group; give {unknown}=..."
        return unknown_key(path, [f.name for f in dataclasses.fields(holder)])
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
