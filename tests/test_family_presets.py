"""Experiments of VDVAE and Efficient-VDVAE, held against tables of their authors' settings."""

import pytest
import torch

from nvae.cli.config import TrainConfig, compose_train
from nvae.published_settings import FAMILIES, read_settings
from nvae.training.schedule import learning_rate_factor
from tests.test_published_very_deep import PARAMETERS

VDVAE = {
    # images a GPU, GPUs, learning rate, average, clip, skip, steps
    "vdvae_cifar10": (16, 2, 2e-4, 0.9999, 200, 400, 1_050_000),
    "vdvae_imagenet32": (8, 32, 1.5e-4, 0.999, 200, 300, 1_700_000),
    "vdvae_imagenet64": (4, 32, 1.5e-4, 0.999, 220, 380, 1_600_000),
    "vdvae_ffhq256": (1, 32, 1.5e-4, 0.999, 130, 180, 1_700_000),
    "vdvae_ffhq1024": (1, 32, 7e-5, 0.999, 360, 500, 1_700_000),
}
_IMAGENET = (800, 50, 750, 2e-4, None, 800, 5000, 10000)
_HQ_8 = (8, 8, 800, 50, 750, 1e-4, 300, 800, 5000, 10000)
_FFHQ_5 = (16, 8, 900, 50, 750, 1e-4, 20, 1000, 5000, 10000)
_FFHQ_8 = (8, 8, 900, 50, 850, 1e-4, None, 500, 5000, 10000)
_1024 = (8, 8, 900, 50, 850, 1e-4, 300, 1200, 5000, 10000)
_CELEBA = (16, 2, 800, 50, 750, 1e-4, None, 800, 5000, 10000)
EVDVAE = {
    # images, GPUs, thousands of steps (all, start and end of the cosine), least learning rate,
    # clip, skip, steps of KL annealing and of balancing
    "binarized_mnist_baseline": (32, 1, 200, 5, 195, 1e-4, None, 800, 500, 1000),
    "celeba64_baseline": _CELEBA,
    "celeba64_compact": _CELEBA,
    "celebahq1024_baseline": _1024,
    "celebahq256_5bits_baseline": (16, 8, 500, 50, 400, 1e-4, 15, 1000, 5000, 10000),
    "celebahq256_8bits_baseline": _HQ_8,
    "celebahq256_8bits_compact": _HQ_8,
    "cifar10_c1": (32, 1, *_IMAGENET),
    "cifar10_baseline": (32, 2, *_IMAGENET),
    "ffhq1024_baseline": _1024,
    "ffhq256_5bits_c1": _FFHQ_5,
    "ffhq256_5bits_baseline": _FFHQ_5,
    "ffhq256_8bits_baseline": _FFHQ_8,
    "ffhq256_8bits_compact": _FFHQ_8,
    "imagenet32_c1": (64, 2, *_IMAGENET),
    "imagenet32_baseline": (64, 2, *_IMAGENET),
    "imagenet32_compact": (64, 2, *_IMAGENET),
    "imagenet64_c1": (32, 4, *_IMAGENET),
    "imagenet64_baseline": (32, 4, *_IMAGENET),
    "imagenet64_compact": (32, 4, *_IMAGENET),
}


def _check_step(config: TrainConfig, name: str, images: int, gpus: int) -> None:
    """What both families share: the network, the step, the loss's unit, the likelihood."""
    assert config.name == name
    published = read_settings(name, config.architecture).to_dict()
    assert config.model.to_dict() == published | {"normalized": True}
    assert config.data.global_batch == images
    assert config.trainer.accumulate_grad_batches == 1
    assert config.data.batch_size * gpus == images
    assert config.trainer.max_epochs is None
    assert config.objective.per_dimension
    assert not config.objective.kl_balancing
    assert config.objective.spectral_weight == 0
    five = "5bits" in name or name == "vdvae_ffhq256"
    binary = config.data.bits == 1
    assert (config.model.bits, config.data.bits) == (
        (5, 8) if five else (1, 1) if binary else (8, 8)
    )
    assert config.model.normalized  # type: ignore[attr-defined]
    assert config.optimizer.warmup_steps == 100


@pytest.mark.slow  # a second each on a quiet machine
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", PARAMETERS)
def test_builds_on_meta(name: str) -> None:
    config = compose_train([f"experiment={name}"])
    with torch.device("meta"):
        model = config.build_model()
    assert type(model) is FAMILIES[config.architecture]
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", VDVAE)
def test_vdvae(name: str) -> None:
    images, gpus, rate, average, clip, skip, steps = VDVAE[name]
    config = compose_train([f"experiment={name}", f"trainer.devices={gpus}"])
    _check_step(config, name, images * gpus, gpus)
    assert (config.trainer.max_steps, config.trainer.gradient_clip_val) == (steps, clip)
    assert config.callbacks["guard"]["skip_threshold"] == skip
    assert config.callbacks["ema"]["decay"] == average
    assert config.objective.name == "elbo"
    assert config.objective.kl_anneal_portion == 0
    assert not config.data.flip
    o = config.optimizer
    assert (o.name, o.learning_rate, o.beta1, o.beta2) == ("adamw", rate, 0.9, 0.9)
    assert (o.epsilon, o.weight_decay) == (1e-8, 0.01)
    factor = learning_rate_factor(o, 1000, steps)
    assert [factor(s) for s in (0, 49, 99, 100, steps // 2, steps - 1)] == [0.01, 0.5, 1, 1, 1, 1]


@pytest.mark.parametrize("name", EVDVAE)
def test_evdvae(name: str) -> None:
    images, gpus, steps, start, end, least, clip, skip, anneal, balance = EVDVAE[name]
    steps *= 1000
    config = compose_train([f"experiment=evdvae_{name}", f"trainer.devices={gpus}"])
    _check_step(config, f"evdvae_{name}", images, gpus)
    assert (config.trainer.max_steps, config.trainer.gradient_clip_val) == (steps, clip)
    assert config.callbacks["guard"]["skip_threshold"] == skip
    assert config.callbacks["ema"]["decay"] == 0.9999
    assert config.data.flip == ("mnist" not in name)
    o = config.optimizer
    assert (o.name, o.learning_rate, o.min_learning_rate) == ("adamax", 1e-3, least)
    assert (o.beta1, o.beta2, o.epsilon, o.weight_decay) == (0.9, 0.999, 1e-8, 0)
    assert o.decay_start is not None
    assert round(o.decay_start * steps, 3) == start * 1000
    assert round(o.decay_end * steps, 3) == end * 1000
    c = config.objective
    assert c.name == "gamma_balanced"
    assert round(c.kl_anneal_portion * steps, 3) == anneal + 21
    assert round(c.kl_constant_portion * steps, 3) == 21
    assert c.kl_minimum == 1e-4
    assert round(c.options["portion"] * steps, 3) == balance


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_s_recipe_takes_any_images(family: str) -> None:
    config = compose_train([f"experiment={family}", "trainer.max_steps=1000"])
    assert (config.architecture, config.data.name) == (family, "digits")
    assert config.model.image_size == 8


def test_a_preset_on_images_of_another_shape_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"model\.image_size=32 does not fit") as caught:
        compose_train(["experiment=vdvae_cifar10", "data=digits"])
    assert "\n" not in str(caught.value)
