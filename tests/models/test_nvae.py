import pytest
import torch

from nvae.models import NVAE
from nvae.models.cells import CELL_FAMILIES
from tests.models.small import small_config, small_model


@pytest.mark.parametrize("family", list(CELL_FAMILIES))
def test_every_family_trains(family: str) -> None:
    """Shapes, finite loss and a gradient for every parameter: DDP forbids unused ones."""
    model = small_model(cell_family=family, num_flows=1)
    x = torch.rand(2, 1, 16, 16).round()
    output = model(x)
    assert output.logits.shape == (2, 1, 16, 16)
    assert output.kl_per_group.shape == (2, 3)
    loss = (output.kl_per_group.sum(1) - model.likelihood(output.logits).log_prob(x)).mean()
    loss.backward()
    assert torch.isfinite(loss)
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("attention", [True, False])
def test_switches(residual: bool, attention: bool) -> None:
    model = small_model(residual_distributions=residual, squeeze_excitation=attention)
    assert torch.isfinite(model(torch.zeros(2, 1, 16, 16)).kl_per_group).all()


def test_vanilla_is_an_ordinary_vae() -> None:
    """One scale, one group: no towers, no learned constant, the state is made from z."""
    model = small_model(num_scales=1, groups_per_scale=1)
    assert "initial_state" not in dict(model.named_parameters())
    assert sum(1 for _ in model.encoder.groups[0].parameters()) == 0
    output = model(torch.zeros(2, 1, 16, 16))
    assert output.kl_per_group.shape == (2, 1)
    output.logits.sum().backward()
    assert model.sample(3).shape == (3, 1, 16, 16)


@pytest.mark.parametrize(
    ("likelihood", "channels", "bits"),
    [("logistic_mixture", 1, 4), ("logistic_mixture", 3, 8), ("normal", 2, 8), ("bernoulli", 3, 1)],
)
@pytest.mark.parametrize("size", [8, 20])
def test_sizes_channels_and_likelihoods_are_free(
    likelihood: str, channels: int, bits: int, size: int
) -> None:
    model = small_model(image_size=size, image_channels=channels, likelihood=likelihood, bits=bits)
    x = torch.rand(2, channels, size, size).mul(2**bits - 1).round() / (2**bits - 1)
    assert torch.isfinite(model.likelihood(model(x).logits).log_prob(x)).all()
    samples = model.sample(2)
    assert samples.shape == x.shape
    assert samples.min() >= 0
    assert samples.max() <= 1


def test_encoder_and_decoder_may_differ_in_width() -> None:
    model = small_model(encoder_channels=6, decoder_channels=10)
    model(torch.zeros(2, 1, 16, 16)).logits.sum().backward()


def test_given_noise_makes_the_pass_deterministic() -> None:
    model = small_model().eval()
    x, noise = torch.zeros(2, 1, 16, 16), model.draw_noise(2, torch.Generator().manual_seed(0))
    first, second = model(x, noise), model(x, noise)
    assert torch.equal(first.logits, second.logits)
    assert not torch.equal(model(x).logits, first.logits)


def test_an_image_does_not_depend_on_its_neighbors() -> None:
    """In evaluation mode; batch composition must not leak into results."""
    model = small_model(num_flows=1).double().eval()
    x = torch.rand(4, 1, 16, 16, dtype=torch.float64)
    noise = model.draw_noise(4)
    whole = model(x, noise)
    alone = model(x[2:3], [eps[2:3] for eps in noise])
    torch.testing.assert_close(alone.logits, whole.logits[2:3])
    torch.testing.assert_close(alone.log_q, whole.log_q[2:3])


def test_temperature_zero_draws_the_means() -> None:
    model = small_model().eval()
    one, other = (model.sample_logits(2, 0.0, model.draw_noise(2)) for _ in range(2))
    torch.testing.assert_close(one, other)
    groups = model.top_down(model.draw_noise(2), temperature=[0.0, 0.5, 2.0])[1]
    assert groups[0].prior.sigma.max() == 0


def test_latents_decode_to_what_was_drawn() -> None:
    """top_down with given latents is the decoder: same z, same logits."""
    model = small_model().double().eval()
    noise = model.draw_noise(2)
    state, groups = model.top_down(noise)
    again, _ = model.top_down(noise, latents=[group.z for group in groups])
    torch.testing.assert_close(state, again)


def test_memory_format_and_precision_agree() -> None:
    """channels_last float32 against contiguous float64."""
    torch.manual_seed(0)
    model = small_model(num_flows=1).eval()
    x, noise = torch.rand(2, 1, 16, 16), model.draw_noise(2)
    single = NVAE(model.config).eval()
    single.load_state_dict(model.state_dict())
    single.to(memory_format=torch.channels_last)
    exact = model.double()(x.double(), [eps.double() for eps in noise])
    fast = single(x.to(memory_format=torch.channels_last), noise)
    torch.testing.assert_close(fast.logits.double(), exact.logits, rtol=1e-4, atol=1e-4)


def test_half_precision_keeps_densities_in_float32() -> None:
    model = small_model(num_flows=1, likelihood="logistic_mixture", bits=8)
    x = torch.rand(2, 1, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
        log_likelihood = model.likelihood(output.logits).log_prob(x)
    for value in (output.kl_per_group, output.log_q, output.log_p, log_likelihood):
        assert value.dtype == torch.float32
        assert torch.isfinite(value).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.zeros(2, 3, 16, 16)), r"shape \(2, 3, 16, 16\).*takes \(B, 1, 16, 16\)"),
        (lambda m: m(torch.zeros(2, 1, 8, 8)), r"shape \(2, 1, 8, 8\)"),
        (lambda m: m(torch.zeros(2, 1, 16, 16), m.draw_noise(3)), "noise of group 0 has shape"),
        (lambda m: m.sample(1, -0.5), "temperature is -0.5; it must be a finite number, 0 or more"),
        (lambda m: m.sample(1, [1.0]), "1 temperatures for 3 latent groups"),
    ],
)
def test_wrong_input_is_named(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call(small_model().eval())


def test_compiled_cells_keep_checkpoint_keys() -> None:
    model = NVAE(small_config())
    keys = set(model.state_dict())
    for cell in model.postprocess:
        cell.compile()
    assert set(model.state_dict()) == keys
