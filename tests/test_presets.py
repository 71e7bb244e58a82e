"""The paper's presets, from the shipped configuration files, at full size but without memory."""

import pytest
import torch

from nvae.cli.config import compose_train
from nvae.models import NVAE
from nvae.models.config import groups_per_scale

PARAMETERS = {
    "mnist": 33_363_134,
    "cifar10": 130_852_480,
    "celeba64": 153_281_364,
    "imagenet32": 268_509_444,
    "celebahq256": 330_798_664,
    "ffhq256": 330_798_664,
}
GROUPS = {
    "mnist": (10, 5),
    "cifar10": (30,),
    "celeba64": (20, 10, 5),
    "imagenet32": (28,),
    "celebahq256": (16, 8, 4, 4, 4),
    "ffhq256": (16, 8, 4, 4, 4),
}
BATCH_AND_GPUS = {
    "mnist": (200, 2),
    "cifar10": (32, 8),
    "celeba64": (16, 8),
    "imagenet32": (24, 24),
    "celebahq256": (4, 24),
    "ffhq256": (4, 24),
}
"""Of the paper: images on each GPU."""


@pytest.mark.parametrize("name", PARAMETERS)
def test_size_and_groups(name: str) -> None:
    """Parameter counts and groups of the paper, exactly."""
    config = compose_train([f"experiment={name}"])
    with torch.device("meta"):
        model = NVAE(config.model)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert groups_per_scale(config.model) == GROUPS[name]


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("devices", [1, 2, 8, 24])
def test_batch_of_the_paper(name: str, devices: int) -> None:
    """The same images a step on any number of GPUs, and as few micro-batches as memory allows."""
    batch, gpus = BATCH_AND_GPUS[name]
    config = compose_train([f"experiment={name}", f"trainer.devices={devices}"])
    k = config.trainer.accumulate_grad_batches
    assert config.trainer.world_size == devices
    assert config.data.global_batch == batch * gpus
    assert batch * gpus <= devices * k * config.data.batch_size
    assert k == 1 or batch * gpus > devices * (k - 1) * config.data.batch_size
    if devices == gpus:
        assert k == 1


@pytest.mark.parametrize("name", PARAMETERS)
def test_validation_is_a_small_share_of_training(name: str) -> None:
    """A forward pass is a third of a step; some tens of validations, one of them at the end."""
    config = compose_train([f"experiment={name}"])
    assert config.data.train_size is not None
    images = config.data.valid_size or config.data.test_size
    assert images
    epochs, every = config.trainer.max_epochs, config.trainer.check_val_every_n_epoch
    assert epochs is not None
    assert every is not None
    assert images / (3 * config.data.train_size * every) < 0.02
    assert epochs // every >= 30
    assert epochs % every == 0
