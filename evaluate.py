"""Evaluate a checkpoint: `python evaluate.py checkpoint=...`; `--cfg job` shows every setting."""

from nvae.command_line import interruptible

if __name__ == "__main__":
    with interruptible():  # the imports take seconds
        from nvae.cli.evaluate import main

        main()
