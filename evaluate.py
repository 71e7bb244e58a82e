"""Evaluate a checkpoint: `python evaluate.py checkpoint=...`; `--cfg job` shows every setting."""

from nvae.cli import evaluate_command

if __name__ == "__main__":
    evaluate_command()
