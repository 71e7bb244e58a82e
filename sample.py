"""Draw pictures from a checkpoint: `python sample.py checkpoint=...`; `--cfg job` shows all."""

from nvae.command_line import interruptible

if __name__ == "__main__":
    with interruptible():  # the imports take seconds
        from nvae.cli.sample import main

        main()
