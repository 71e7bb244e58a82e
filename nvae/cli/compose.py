"""A training configuration without the command line: for benchmarks, notebooks and tests."""

from collections.abc import Sequence

from hydra import compose, initialize_config_dir

from nvae.cli.config import TrainConfig, register, train_config
from nvae.settings import CONFIGS


def compose_train(overrides: Sequence[str] = ()) -> TrainConfig:
    """What ``python train.py`` would run with these overrides, such as ``experiment=mnist``.

    Raises:
        ValueError: an impossible combination; hydra's and omegaconf's errors for unknown keys,
            wrong types and unknown choices.
    """
    register()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return train_config(compose("train", overrides=list(overrides)))
