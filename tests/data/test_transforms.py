"""uint8 -> model input: exact values, fair coins, no dependence on the batch."""

import pytest
import torch

from nvae.data.transforms import (
    InputTransform,
    binarize,
    dequantise,
    pad_zeros,
    quantise,
    random_flip,
)


def all_values() -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)


def make_transform(**overrides) -> InputTransform:
    values = {
        "bits": 8,
        "pad": 0,
        "flip": False,
        "binarize": "none",
        "seed": 0,
        "eval_seed": 0,
    }
    return InputTransform(**(values | overrides))


@pytest.mark.parametrize("bits", range(1, 9))
def test_quantisation_is_the_formula_of_the_spec(bits):
    """x <- floor(255 x / 2^(8-b)) / (2^b - 1), for every pixel value."""
    got = dequantise(quantise(all_values(), bits), bits).flatten().tolist()
    wanted = [
        torch.tensor((v // 2 ** (8 - bits)) / (2**bits - 1), dtype=torch.float32).item()
        for v in range(256)
    ]
    assert got == wanted


def test_flip_is_a_fair_coin_per_image_and_mirrors_the_width():
    images = torch.arange(12, dtype=torch.uint8).view(1, 2, 3, 2).expand(4000, -1, -1, -1)
    index = torch.arange(4000)
    flipped = random_flip(images, index, seed=1, epoch=0)
    is_flipped = (flipped == images.flip(2)).flatten(1).all(1)
    is_same = (flipped == images).flatten(1).all(1)
    assert (is_flipped ^ is_same).all()
    assert abs(is_flipped.double().mean() - 0.5) < 0.04
    other_epoch = random_flip(images, index, seed=1, epoch=1)
    assert not torch.equal(other_epoch, flipped)


def test_binarisation_has_the_pixel_as_its_mean():
    images = all_values().expand(4000, -1, -1, -1)
    draws = binarize(images, torch.arange(4000), seed=0, epoch=0)
    assert set(draws.unique().tolist()) == {0, 1}
    mean = draws.double().mean(0).flatten()
    assert mean[0] == 0
    assert mean[255] == 1
    # The standard error is at most 0.008.
    assert (mean - torch.arange(256) / 255).abs().max() < 0.04


def test_pad_adds_a_border_of_zeros():
    padded = pad_zeros(torch.ones(2, 3, 3, 1, dtype=torch.uint8), 2)
    assert padded.shape == (2, 7, 7, 1)
    assert padded.sum() == 2 * 9
    assert padded[:, 2:5, 2:5].min() == 1


def test_input_is_channels_last_float_in_unit_range():
    images = torch.randint(0, 256, (2, 6, 6, 3), dtype=torch.uint8)
    x = make_transform(pad=1)(images, torch.arange(2), epoch=None)
    assert x.shape == (2, 3, 8, 8)
    assert x.dtype == torch.float32
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x[:, :, 1:-1, 1:-1], images.permute(0, 3, 1, 2).float() / 255)


@pytest.mark.parametrize("epoch", [None, 0, 3])
@pytest.mark.parametrize("binarize_as", ["none", "dynamic", "static"])
def test_an_image_does_not_depend_on_its_batch(epoch, binarize_as):
    transform = make_transform(flip=True, binarize=binarize_as, bits=1)
    images = torch.randint(0, 256, (10, 4, 4, 3), dtype=torch.uint8)
    index = torch.arange(100, 110)
    together = transform(images, index, epoch=epoch)
    alone = [transform(images[i, None], index[i, None], epoch=epoch) for i in range(10)]
    assert torch.equal(together, torch.cat(alone))


def test_flips_happen_in_training_only():
    transform = make_transform(flip=True)
    images = torch.randint(0, 256, (32, 4, 4, 3), dtype=torch.uint8)
    plain = images.permute(0, 3, 1, 2).float() / 255
    index = torch.arange(32)
    assert torch.equal(transform(images, index, epoch=None), plain)
    assert not torch.equal(transform(images, index, epoch=0), plain)


def test_dynamic_is_fresh_each_epoch_static_never_and_evaluation_is_fixed():
    images = torch.full((8, 4, 4, 1), 128, dtype=torch.uint8)
    index = torch.arange(8)

    def draw(kind, epoch, seed=0):
        return make_transform(binarize=kind, bits=1, seed=seed)(images, index, epoch=epoch)

    assert not torch.equal(draw("dynamic", 0), draw("dynamic", 1))
    assert not torch.equal(draw("dynamic", 0), draw("dynamic", None))
    assert torch.equal(draw("static", 0), draw("static", 1))
    # A test NLL must be one number for every training seed.
    assert torch.equal(draw("dynamic", None, seed=1), draw("dynamic", None, seed=2))
    assert torch.equal(draw("dynamic", None), draw("static", None))
    other = make_transform(binarize="dynamic", bits=1, eval_seed=1)(images, index, epoch=None)
    assert not torch.equal(other, draw("dynamic", None))


def test_the_border_stays_zero_when_binarised():
    transform = make_transform(binarize="dynamic", bits=1, pad=2)
    x = transform(torch.full((4, 4, 4, 1), 255, dtype=torch.uint8), torch.arange(4), epoch=0)
    assert x.sum() == 4 * 16


@pytest.mark.gpu
@pytest.mark.parametrize("binarize_as", ["none", "dynamic"])
@pytest.mark.parametrize("bits", [1, 5, 8])
def test_same_input_on_cuda(cuda, binarize_as, bits):
    transform = make_transform(flip=True, pad=2, binarize=binarize_as, bits=bits)
    images = torch.randint(0, 256, (16, 28, 28, 3), dtype=torch.uint8)
    index = torch.arange(16)
    here = transform(images, index, epoch=4)
    there = transform(images.to(cuda), index.to(cuda), epoch=4)
    assert torch.equal(here, there.cpu())
