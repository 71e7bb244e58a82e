import math

import pytest
import torch

from nvae.models import VDVAE, VDVAEConfig
from nvae.models.vdvae_config import Block, parse_blocks


def config(**changes):
    values = {
        "image_size": 8, "image_channels": 1, "num_mixtures": 2, "bits": 4, "width": 8,
        "latent_channels": 2, "bottleneck_multiple": 0.5,
        "encoder_blocks": "8x1,8d2,4x1,4d4,1x1", "decoder_blocks": "1,4m1,4,8m4,8x2",
    }  # fmt: skip
    return VDVAEConfig(**{**values, **changes})


def test_a_resolution_is_named_by_its_shorter_side():
    """The strings of a square serve a rectangle; every resolution has the image's proportions."""
    wide = VDVAE(config(image_size=[8, 24]))
    assert [shape[1:] for shape in wide.latent_shapes] == [
        (1, 3), (4, 12), (4, 12), (8, 24), (8, 24), (8, 24)
    ]  # fmt: skip
    assert [tuple(state.shape[2:]) for state in wide.initial_states] == [(1, 3), (4, 12), (8, 24)]
    assert wide.encoder.blocks[-1].convs[1].kernel_size == (3, 3)  # at 1x3 there is a neighbor
    assert VDVAE(config()).encoder.blocks[-1].convs[1].kernel_size == (1, 1)


def test_block_strings():
    """Every form, with spaces around numbers; N = 0 gives none."""
    assert parse_blocks(" 8 x 2,8d2, 4,2x0", "encoder_blocks", "d") == [
        Block(8, None), Block(8, None), Block(8, 2), Block(4, None)
    ]  # fmt: skip
    assert parse_blocks("4m1", "decoder_blocks", "m") == [Block(4, 1)]


@pytest.mark.parametrize("item", ["", "8x", "x2", "8x-1", "8d0", "0x2", "8dd2", "a", "8x2x2", "²"])
def test_what_is_no_block(item):
    with pytest.raises(ValueError, match=r"^model\.encoder_blocks: .* is no block; blocks are"):
        config(encoder_blocks=f"8x1,{item}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_blocks": "8m4"}, "'8m4' mixes, as a decoder does"),
        ({"decoder_blocks": "8d2"}, "'8d2' pools, which only an encoder does"),
        ({"encoder_blocks": "4x1"}, "has a block at 4, but its input is 8 wide"),
        ({"encoder_blocks": "8d2,8x1"}, "has a block at 8, but its input is 4 wide"),
        ({"encoder_blocks": "8d3"}, "8d3 does not divide 8"),
        ({"encoder_blocks": "8x100000"}, "more than 5000 blocks"),
        ({"decoder_blocks": "2,8m2"}, "block at 2, which the encoder does not have"),
        ({"decoder_blocks": "1,4m1"}, "no block at the image's resolution, 8"),
        ({"decoder_blocks": "4m1,8m4"}, "4m1 mixes in 1, which no block before it has made"),
        ({"decoder_blocks": "8m4,4", "no_bias_above": 1}, "8m4 mixes in 4"),
        ({"decoder_blocks": "4,8m4,4m8"}, "8 does not divide 4"),
        ({"custom_widths": "8:16"}, "16 channels at the image's resolution"),
        ({"custom_widths": "4:16,1:8"}, "8 channels at 1 are fewer than the 16 at 4"),
        ({"custom_widths": "2:16"}, "names resolution 2, which the encoder does not"),
        ({"custom_widths": "4:16,4:16"}, "each resolution once"),
        ({"custom_widths": "4:0"}, "'4:0' is no width"),
        ({"bottleneck_multiple": 0.1}, "leaves no channel of the 8 at 8"),
        ({"pixel_std": 0.0}, "model.pixel_std is 0.0; it must be at least"),
        (
            {"image_size": [8, 12]},
            "[8, 12] cannot be pooled by 8, as model.encoder_blocks does; "
            "each side must be a multiple of 8, the nearest is [8, 16]",
        ),
        ({"image_size": [16, 24]}, "block at 8, but its input is 16 wide"),
        ({"bits": 12, "normalized": False}, "published form, for 8 bits at most"),
    ],
)
def test_what_cannot_work_is_one_line(changes, message):
    with pytest.raises(ValueError, match=r"^model") as error:
        config(**changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_bottleneck_widths_are_cut():
    """0.3 * 24 is a little below 7.2: seven."""
    assert config(width=24, bottleneck_multiple=0.3).middle_at(8) == 7


def test_the_decoder_may_return_to_a_coarser_state():
    """The table holds the latest state of every resolution; the end reads the image's."""
    model = VDVAE(config(decoder_blocks="1,8m1,4m1,8m4,1"))
    assert [shape[1] for shape in model.latent_shapes] == [1, 8, 4, 8, 1]
    x = torch.rand(2, 1, 8, 8)
    assert model(x).logits.shape == (2, 6, 8, 8)


def test_without_learned_states_sampling_works_too():
    model = VDVAE(config(no_bias_above=0, decoder_blocks="1,8")).eval()
    assert not list(model.initial_states)
    assert model.sample(3).shape == (3, 1, 8, 8)


def test_padding_and_absent_states_have_the_models_type():
    """In the authors' code float64 models are rounded to float32 there."""
    model = VDVAE(config(custom_widths="1:16,4:12", no_bias_above=1)).double()
    output = model(torch.rand(2, 1, 8, 8, dtype=torch.float64))
    assert output.logits.dtype == torch.float64
    assert all(group.z.dtype == torch.float64 for group in output.groups)


def test_initialization():
    torch.manual_seed(0)
    model = VDVAE(config(width=64, decoder_blocks="1,4m1,8m4,8x6"))
    assert all(not p.any() for name, p in model.named_parameters() if "bias" in name)
    encoder, layer, layers = model.encoder.blocks[0], model.groups[0], len(model.groups)
    bound = 1 / math.sqrt(32)  # of a 1x1 convolution from 32 channels
    for conv, factor in (
        (encoder.convs[-1], math.sqrt(1 / 5)),
        (layer.cells.convs[-1], math.sqrt(1 / layers)),
        (layer.posterior.convs[-1], 1),
        (layer.prior.convs[-1], 0),
    ):
        assert conv.weight.abs().max().item() == pytest.approx(factor * bound, rel=0.05, abs=1e-9)
    assert layer.merge_latent.weight.abs().max() <= 1 / math.sqrt(2 * layers)
    # every prior starts as N(0, 1), and adds nothing to the state
    _, groups = model.top_down(model.draw_noise(1))
    assert all(not g.prior.mean.any() and (g.prior.sigma == 1).all() for g in groups)


def test_temperature_and_latents_of_a_layer():
    model = VDVAE(config()).eval()
    noise = model.draw_noise(2)
    still = model.sample_logits(2, 0.0, noise)
    assert torch.equal(still[0], still[1])
    one = [1.0] + [0.0] * (model.num_groups - 1)
    assert not torch.equal(model.sample_logits(2, one, noise), still)
    with pytest.raises(ValueError, match="2 temperatures for 6 latent groups"):
        model.sample_logits(2, [1.0, 0.5])
    with pytest.raises(ValueError, match="7 latents for 6 latent groups"):
        model.top_down(noise, latents=[None] * 7)
