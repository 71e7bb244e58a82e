"""Draw pictures from a checkpoint: `python sample.py checkpoint=...`; `--cfg job` shows all."""

from nvae.cli.sample import main

if __name__ == "__main__":
    main()
