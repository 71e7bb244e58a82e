"""Prior samples: one image, one seed, whatever else is drawn beside it."""

import pytest
import torch

from nvae.sampling import sample_images, scale_temperatures

from .models import small_nvae


@pytest.mark.parametrize("likelihood", ["bernoulli", "logistic_mixture", "normal"])
def test_an_image_depends_on_its_seed_only(likelihood):
    model = small_nvae(likelihood)
    together = sample_images(model, range(10), batch_size=4)
    alone = sample_images(model, [7])
    assert torch.allclose(together[7:8], alone, atol=1e-5)
    reordered = sample_images(model, [9, 3], batch_size=1)
    assert torch.allclose(reordered, together[[9, 3]], atol=1e-5)
    assert not torch.allclose(together[3], together[9], atol=1e-2)


def test_color_works_too():
    images = sample_images(small_nvae("logistic_mixture", channels=3), [0, 1])
    assert images.shape == (2, 3, 8, 8)
    assert images.min() >= 0
    assert images.max() <= 1


def test_temperature_zero_gives_one_image_for_all_seeds():
    model = small_nvae("normal")
    still = sample_images(model, range(4), temperature=0.0, pixel_temperature="mean")
    assert torch.allclose(still, still[:1].expand_as(still), atol=1e-6)
    moving = sample_images(model, range(4), temperature=1.0, pixel_temperature="mean")
    assert moving.std(0).mean() > 1e-3


def test_latent_and_pixel_temperature_are_apart():
    model = small_nvae("normal")
    mean = sample_images(model, range(6), pixel_temperature="mean")
    assert torch.allclose(sample_images(model, range(6), pixel_temperature=0), mean, atol=1e-6)
    a_little = (sample_images(model, range(6), pixel_temperature=0.1) - mean).abs().mean()
    a_lot = (sample_images(model, range(6), pixel_temperature=1.0) - mean).abs().mean()
    assert 0 < a_little < a_lot


def test_pixel_noise_differs_between_images_of_the_same_latents():
    model = small_nvae("normal")
    images = sample_images(model, range(2), temperature=0.0)
    assert not torch.allclose(images[0], images[1], atol=1e-2)


def test_group_temperatures_narrow_only_their_groups():
    model = small_nvae("normal")
    plain = sample_images(model, range(4), pixel_temperature="mean")
    same = sample_images(model, range(4), temperature=[1, 1, 1], pixel_temperature="mean")
    assert torch.equal(plain, same)
    other = sample_images(model, range(4), temperature=[1, 1, 0.2], pixel_temperature="mean")
    assert not torch.allclose(plain, other, atol=1e-4)


def test_scale_temperatures_go_coarsest_first():
    model = small_nvae()  # one coarse group, two fine ones
    assert scale_temperatures(model, [0.5, 0.9]) == [0.5, 0.9, 0.9]
    with pytest.raises(ValueError, match="3 temperatures for 2"):
        scale_temperatures(model, [1, 1, 1])


def test_progress_and_mode():
    model = small_nvae().train()
    done = []
    sample_images(model, range(5), batch_size=2, progress=done.append)
    assert done == [2, 2, 1]
    assert model.training


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": [1.0, 1.0]}, "2 temperatures for 3"),
        ({"pixel_temperature": -1.0}, "pixel_temperature"),
        ({"pixel_temperature": "mode"}, "allowed: mean"),
        ({"pixel_temperature": float("nan")}, "pixel_temperature"),
        ({"seeds": []}, "no seeds"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_wrong_arguments_are_refused(wrong, message):
    arguments = {"seeds": [0, 1], **wrong}
    with pytest.raises(ValueError, match=message):
        sample_images(small_nvae(), arguments.pop("seeds"), **arguments)
