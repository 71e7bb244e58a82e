"""What `sample.py` and `evaluate.py` share: compose with Hydra, work, one line for an error."""

from collections.abc import Callable

from omegaconf import DictConfig

from nvae.cli.errors import UserError, is_out_of_memory, run
from nvae.command_line import brief

_BOUNDS_MEMORY = {"sample": "batch_size", "evaluate": "chunk or sample_batch_size"}


def run_command(name: str, work: Callable[[DictConfig], None], schema: type) -> None:
    """Compose `configs/NAME.yaml` with the command line and work on it.

    Args:
        name: of the root configuration.
        work: what to do; its ValueErrors and OSErrors are the input's fault, and running out of
            memory is told with what to lower.
        schema: of the configuration.
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

    run(name, checked, schema)
