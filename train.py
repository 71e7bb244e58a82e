"""Train an NVAE: `python train.py data=mnist`; `--cfg job` shows every setting."""

from nvae.cli import train_command

if __name__ == "__main__":
    train_command()
