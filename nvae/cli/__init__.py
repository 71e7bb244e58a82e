"""The commands: configuration, its checks, and what `train.py` and its siblings run."""
