"""Small configurations for the tests of nvae.data."""

from collections.abc import Callable
from typing import Any

import pytest

from nvae.data.config import DataConfig


@pytest.fixture
def make_config() -> Callable[..., DataConfig]:
    """A valid config of tiny random images; keyword arguments override."""

    def make(**overrides: Any) -> DataConfig:
        values: dict[str, Any] = {
            "name": "tiny",
            "format": "random",
            "image_size": 8,
            "channels": 3,
            "bits": 8,
            "likelihood": "logistic_mixture",
            "train_size": 50,
            "valid_size": 7,
            "test_size": 5,
            "batch_size": 8,
            "eval_batch_size": 4,
        }
        return DataConfig(**(values | overrides))

    return make
