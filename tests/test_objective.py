"""What a step minimizes beside the ELBO: lambda, free bits, flooding, noise to the encoder."""

from typing import Any

import pytest
import torch

from nvae.models import NVAE, ModelConfig
from nvae.objective import Loss, Objective, ObjectiveConfig


def tiny() -> NVAE:
    return NVAE(ModelConfig(image_size=8, num_scales=1, groups_per_scale=2, preprocess_blocks=1,
                            preprocess_cells=1, postprocess_cells=1, encoder_channels=4,
                            decoder_channels=4, latent_channels=2))  # fmt: skip


def loss_of(model: NVAE, x: torch.Tensor, input_noise: Any = None, **settings: Any) -> Loss:
    """In the middle of annealing, with the same noise at every call."""
    noise = model.draw_noise(len(x), torch.Generator().manual_seed(0))
    objective = Objective(model, ObjectiveConfig(**settings))
    loss: Loss = objective(
        model, x, noise, step=15, total_steps=100, input_noise=input_noise, regularize=False
    )
    return loss


def test_lambda_is_geometric_between_its_ends() -> None:
    objective = Objective(
        tiny(), ObjectiveConfig(spectral_weight=1e-2, spectral_weight_initial=1.0)
    )
    assert objective.spectral_weight(0.0) == pytest.approx(1.0)
    assert objective.spectral_weight(0.5) == pytest.approx(1e-1)
    assert objective.spectral_weight(1.0) == pytest.approx(1e-2)
    assert Objective(tiny(), ObjectiveConfig(spectral_weight=0.0)).spectral_weight(0.3) == 0.0


def test_a_group_below_its_free_bits_is_not_pushed_further() -> None:
    """Its share of the loss is a constant, and no gradient of the KL reaches its posterior."""
    model, x = tiny().eval(), torch.rand(4, 1, 8, 8).round()
    plain = loss_of(model, x, kl_balancing=False)
    low, high = sorted(plain.kl_per_group.tolist())
    assert low < high
    between = loss_of(model, x, kl_balancing=False, free_bits=(low + high) / 2)
    beta = plain.coefficients["beta"]
    expected = plain.data + beta * ((low + high) / 2 - low)
    torch.testing.assert_close(between.data, expected)
    torch.testing.assert_close(between.terms["kl"], plain.terms["kl"])  # reported as it is
    above = loss_of(model, x, kl_balancing=False, free_bits=10 * high)
    above.data.backward()
    with_kl = [p.grad.clone() for p in model.groups.parameters() if p.grad is not None]
    model.zero_grad()
    output = model(x, model.draw_noise(4, torch.Generator().manual_seed(0)))
    (-model.likelihood(output.logits).log_prob(x)).mean().backward()
    without = [p.grad for p in model.groups.parameters() if p.grad is not None]
    for a, b in zip(with_kl, without, strict=True):
        torch.testing.assert_close(a, b)


def test_flooding_turns_the_gradient_round_below_the_level() -> None:
    """|J - b| + b: above b nothing changes, below it the loss is driven up again."""
    model, x = tiny().eval(), torch.rand(4, 1, 8, 8).round()
    plain = loss_of(model, x)
    level = float(plain.total)
    torch.testing.assert_close(loss_of(model, x, flooding=level - 5).data, plain.data)
    below = loss_of(model, x, flooding=level + 5)
    torch.testing.assert_close(below.data, plain.data + 10)
    weight = next(model.parameters())
    (up,) = torch.autograd.grad(below.data, weight)
    (down,) = torch.autograd.grad(plain.data, weight)
    torch.testing.assert_close(up, -down)


def test_noise_goes_to_the_encoder_and_not_to_the_likelihood() -> None:
    model, x = tiny().eval(), torch.rand(4, 1, 8, 8).round()
    eps = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    noisy = loss_of(model, x, eps, encoder_noise=0.3)
    noise = model.draw_noise(4, torch.Generator().manual_seed(0))
    state, _ = model.top_down(noise, encoder_maps=model.encode(x + 0.3 * eps))
    expected = -model.likelihood(model.decode_state(state)).log_prob(x).mean()
    torch.testing.assert_close(noisy.terms["reconstruction"], expected)
    assert not torch.allclose(noisy.data, loss_of(model, x).data)


@pytest.mark.parametrize(
    "settings",
    [{"free_bits": -1.0}, {"free_bits": float("nan")}, {"encoder_noise": 2.0},
     {"flooding": float("inf")}],
)  # fmt: skip
def test_impossible_settings_are_named(settings: dict[str, float]) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=rf"^objective\.{name} is"):
        ObjectiveConfig(**settings)
