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


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("variant", ["", "_1gpu"])
def test_size_and_groups(name: str, variant: str) -> None:
    """Parameter counts and groups of the paper, exactly; one GPU changes neither."""
    config = compose_train([f"experiment={name}{variant}"])
    with torch.device("meta"):
        model = NVAE(config.model)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert groups_per_scale(config.model) == GROUPS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_batch_of_the_paper(name: str) -> None:
    """Images per optimizer step; the single-GPU variant keeps them by accumulation."""
    batch, gpus = BATCH_AND_GPUS[name]
    paper = compose_train([f"experiment={name}"])
    single = compose_train([f"experiment={name}_1gpu"])
    assert paper.data.batch_size == batch
    assert paper.trainer.devices * paper.trainer.num_nodes == gpus
    assert single.trainer.devices * single.trainer.num_nodes == 1
    assert single.data.batch_size * single.trainer.accumulate_grad_batches == batch * gpus
