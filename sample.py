"""Draw pictures from a checkpoint: `python sample.py checkpoint=...`; `--cfg job` shows all."""

from nvae.cli import sample_command

if __name__ == "__main__":
    sample_command()
