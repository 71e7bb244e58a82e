"""Train an NVAE: `python train.py experiment=digits`; `--cfg job` shows every setting."""

from nvae.cli.train import main

if __name__ == "__main__":
    main()
