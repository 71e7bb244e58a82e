"""`python -m nvae.export CHECKPOINT --to DIR`; see :mod:`nvae.export.command`."""

from nvae.command_line import interruptible

if __name__ == "__main__":
    with interruptible():  # the imports take seconds
        from nvae.export.command import main

        main()
