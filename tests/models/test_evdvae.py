import math

import pytest
import torch

from nvae.models import EVDVAE, EVDVAEConfig
from nvae.models.distributions import Normal
from nvae.models.very_deep import LogSigmaNormal, keep_by_kl


def config(**changes):
    values = {
        "image_size": 8, "image_channels": 1, "num_mixtures": 2, "bits": 4,
        "input_conv_filters": 8, "up_strides": [1, 2, 4, 1], "down_strides": [1, 4, 2, 1],
        "up_filters": [8, 12, 12, 12], "up_skip_filters": [8, 8, 12, 12],
        "down_filters": [12, 12, 8, 8], "up_kernel_size": [3, 3, 3, 1],
        "down_kernel_size": [1, 3, 3, 3], "down_n_blocks_per_res": [0, 1, 0, 2],
        "down_latent_variates": [2, 2, 3, 2],
    }  # fmt: skip
    return EVDVAEConfig(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"up_strides": []}, "model.up_strides is empty; it has one entry a level"),
        ({"up_filters": [8, 12, 12]}, "model.up_filters has 3 entries, model.up_strides 4"),
        ({"down_n_layers": [2]}, "model.down_n_layers has 1 entries"),
        ({"down_strides": [1, 2, 4, 1]}, "must be model.up_strides in reverse"),
        ({"image_size": 12}, "cannot be divided by the product of model.up_strides, 8"),
        (
            {"image_size": [24, 20]},
            "[24, 20] cannot be divided by the product of model.up_strides, 8;"
            " each side must be a multiple of 8, the nearest is 24",
        ),
        ({"up_filters": [10, 12, 12, 12]}, "model.up_filters[0]=10 but the level has stride 1"),
        ({"down_filters": [12, 12, 8, 10]}, "model.down_filters[3]=10 but the level has stride 1"),
        ({"up_skip_filters": [8, 8, 12, 8]}, "model.up_skip_filters[3]=8 but model.down_filters"),
        ({"up_kernel_size": [3, 2, 3, 1]}, "model.up_kernel_size holds 2; all must be odd"),
        ({"output_kernel_size": 2}, "model.output_kernel_size is 2; it must be odd"),
        ({"up_mid_filters_ratio": [0.5, 0.1, 0.5, 0.5]}, "leaves no channel of 8"),
        ({"distribution_base": "exp"}, "allowed: std, logstd"),
        ({"gradient_smoothing_beta": 0.0}, "model.gradient_smoothing_beta is 0.0"),
        ({"down_n_blocks_per_res": [0, 0, 0, 1000], "down_n_blocks": [1, 1, 1, 9]}, "above 5000"),
        ({"up_strides": [1, 2, 4.5, 1]}, "is not a list of an integer"),
    ],
)
def test_what_cannot_work_is_one_line(changes, message):
    with pytest.raises(ValueError, match="model") as error:
        config(**changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_layers_are_numbered_in_order_of_execution():
    model = EVDVAE(config())
    assert model.latent_shapes == (
        (2, 1, 1), (2, 4, 4), (2, 4, 4), (3, 8, 8), (2, 8, 8), (2, 8, 8), (2, 8, 8)
    )  # fmt: skip
    assert model.groups_per_scale == (1, 2, 4)
    assert model.layer_temperatures([0.6, 0.7, 0.8, 0.9]) == [0.6, 0.7, 0.7, 0.8, 0.9, 0.9, 0.9]
    with pytest.raises(ValueError, match="1 temperatures for 4 levels"):
        model.layer_temperatures([1.0])


def test_the_network_reads_what_the_likelihood_counts():
    """The low bits are dropped before the encoder; binary pixels go in as they are."""
    model = EVDVAE(config(bits=5))
    x = torch.full((1, 1, 8, 8), 87 / 255)
    assert model._network_input(x).mean().item() == pytest.approx((80 - 127.5) / 127.5)
    binary = EVDVAE(config(bits=1, likelihood="bernoulli"))
    assert torch.equal(binary._network_input(x.round()), x.round())


@pytest.mark.parametrize("base", ["std", "logstd"])
def test_residual_posterior_is_the_prior_where_its_head_is_silent(base):
    """m = 0 and a factor of 1 on sigma, which is raw = 0 in both bases (beta = ln 2)."""
    model = EVDVAE(config(distribution_base=base, use_residual_distribution=True))
    with torch.no_grad():
        for layer in model.groups:
            layer.posterior_head.weight.zero_()
            layer.posterior_head.bias.zero_()
    output = model(torch.rand(2, 1, 8, 8))
    assert output.kl_per_group.abs().max() < 1e-3


def test_initialization():
    torch.manual_seed(0)
    model = EVDVAE(config(initialize_prior_weights_as_zero=True, up_filters=[8, 64, 64, 64],
                          up_skip_filters=[8, 8, 64, 64], down_filters=[64, 64, 8, 8]))  # fmt: skip
    layer, shrink = model.groups[0], math.sqrt(1 / model.num_groups)
    cell = layer.cells[0]
    assert cell.convs[0].bias.any(), "the first convolution has torch's own initialization"
    assert not cell.convs[1].bias.any()
    xavier = math.sqrt(6 / (32 + 64))
    assert cell.convs[-1].weight.abs().max().item() == pytest.approx(shrink * xavier, rel=0.05)
    assert layer.posterior_head.weight.abs().max().item() == pytest.approx(
        math.sqrt(6 / (64 + 4)), rel=0.1
    )
    assert not layer.prior.convs[-1].weight.any()
    assert model.initial_state.abs().max().item() == pytest.approx(math.sqrt(3 / 64), rel=0.1)


def test_all_channels_kept_is_the_posterior_and_none_the_prior():
    model = EVDVAE(config()).eval()
    x, noise, more = torch.rand(2, 1, 8, 8), model.draw_noise(2), model.draw_noise(2)
    everything = [torch.ones(shape[0], dtype=torch.bool) for shape in model.latent_shapes]
    nothing = [~kept for kept in everything]
    assert torch.equal(model.masked(x, everything, noise, more).logits, model(x, noise).logits)
    drawn = model.sample_logits(2, noise=more)
    torch.testing.assert_close(model.masked(x, nothing, noise, more).logits, drawn)


def test_channels_that_carry_most_are_kept():
    keep, threshold = keep_by_kl([torch.tensor([0.0, 3.0]), torch.tensor([1.0, 2.0])], 0.5)
    assert [each.tolist() for each in keep] == [[False, True], [False, True]]
    assert threshold == 1.5
    with pytest.raises(ValueError, match=r"quantile is 1\.5"):
        keep_by_kl([torch.zeros(1)], 1.5)
    assert all(kept.all() for kept in keep_by_kl([torch.zeros(2), torch.ones(1)], 1.0)[0])


def test_kl_and_density_where_sigma_underflows():
    """float32 rounds exp(-150) to 0; the KL of one such Normal and its like is still 0."""
    mean, log_sigma = torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), -150.0)
    narrow = LogSigmaNormal.of(mean, log_sigma)
    assert narrow.sigma == 0
    assert narrow.kl(narrow) == 0
    assert narrow.log_prob(mean).item() == pytest.approx(150 - 0.5 * math.log(2 * math.pi))
    wide = LogSigmaNormal.of(mean + 1, log_sigma + 150.5)
    plain = Normal(wide.mean, wide.sigma)
    torch.testing.assert_close(wide.kl(plain), torch.zeros(1, 1, 1, 1), atol=1e-6, rtol=0)
    z = torch.tensor(0.3).view(1, 1, 1, 1)
    torch.testing.assert_close(wide.log_prob(z), plain.log_prob(z))
