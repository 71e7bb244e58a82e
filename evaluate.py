"""Evaluate a checkpoint: `python evaluate.py checkpoint=...`; `--cfg job` shows every setting."""

from nvae.cli.evaluate import main

if __name__ == "__main__":
    main()
