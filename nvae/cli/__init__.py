"""The commands: configuration, its checks, and what `train.py` and its siblings run.

Below are the console scripts. They import what they need when they are called, which takes seconds,
and Ctrl-C is answered meanwhile.
"""

from functools import partial
from importlib import import_module

from nvae.command_line import interruptible
from nvae.started import end_with_first_process


def _command(module: str) -> int | None:
    end_with_first_process()
    with interruptible():
        return import_module(module).main()


train_command = partial(_command, "nvae.cli.train")
sample_command = partial(_command, "nvae.cli.sample")
evaluate_command = partial(_command, "nvae.cli.evaluate")
compress_command = partial(_command, "nvae.cli.compress")
decompress_command = partial(_command, "nvae.cli.decompress")
prepare_command = partial(_command, "nvae.data.prepare")
report_command = partial(_command, "nvae.report.__main__")
export_command = partial(_command, "nvae.export.__main__")
