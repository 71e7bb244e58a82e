from argparse import Namespace
from typing import Any

import pytest
import torch

from nvae.checkpoint import load_checkpoint
from nvae.models import NVAE
from nvae.models.cells import CELL_FAMILIES
from nvae.published import is_published, model_config, name_pairs, translate_published
from tests.models.small import small_model
from tests.reference import checkpoint_path


@pytest.fixture
def published() -> dict[str, Any]:
    return load_checkpoint(checkpoint_path("mnist"))


def test_the_format_is_recognized(published: dict[str, Any]) -> None:
    assert is_published(published)
    assert not is_published({"state_dict": {}, "args": {}})


def test_early_files_lack_three_arguments(published: dict[str, Any]) -> None:
    """ada_groups False, min_groups_per_scale 1, num_mixture_dec 10."""
    values = vars(published["args"]).copy()
    for name in ("ada_groups", "min_groups_per_scale", "num_mixture_dec"):
        del values[name]
    config = model_config(Namespace(**values))
    assert not config.adaptive_groups
    assert config.min_groups_per_scale == 1
    assert config.num_mixtures == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "my_pets"}, "data set 'my_pets' is unknown; known: .*celeba_64"),
        ({"num_postprocess_blocks": 1}, "halves 2 times but doubles 1 times"),
        ({"arch_instance": "res_next"}, "cell_family='res_next' is unknown"),
        ({"num_channels_enc": 16}, r"'stem.weight' has shape \(8, 1, 3, 3\)"),
        ({"num_groups_per_scale": 3}, "lacks the weight|has shape"),
        ({"num_cell_per_cond_dec": 2}, "lacks the weight|has shape"),
    ],
)
def test_misfits_are_named(published: dict[str, Any], change: dict[str, Any], message: str) -> None:
    published["args"] = Namespace(**{**vars(published["args"]), **change})
    with pytest.raises(ValueError, match=message):
        translate_published(published)


def test_surplus_weights_are_named(published: dict[str, Any]) -> None:
    published["state_dict"]["dec_tower.99.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"this model lacks: .dec_tower\.99\.weight"):
        translate_published(published)


def test_one_mixture_means_a_normal(published: dict[str, Any]) -> None:
    values = {**vars(published["args"]), "dataset": "cifar10", "num_mixture_dec": 1}
    assert model_config(Namespace(**values)).likelihood == "normal"


@pytest.mark.parametrize("family", list(CELL_FAMILIES))
@pytest.mark.parametrize("groups", [1, 2])
def test_every_entry_has_one_published_name(family: str, groups: int) -> None:
    """For all families, and the vanilla model: the translation covers the state, once each."""
    scales = 1 if groups == 1 else 2
    model: NVAE = small_model(
        cell_family=family, num_flows=1, num_scales=scales, groups_per_scale=groups
    )
    pairs = list(name_pairs(model))
    ours = [target for target, _ in pairs]
    theirs = [source for _, sources in pairs for source in sources]
    expected = {name for name in model.state_dict() if not name.endswith(".initialized")}
    assert len(ours) == len(set(ours))
    assert set(ours) == expected
    assert len(theirs) == len(set(theirs))
