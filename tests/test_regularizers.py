import pytest
import torch
from torch import Tensor, nn

from nvae.models.flows import Flow
from nvae.models.layers import FactorizedSkip, PlainConv2d, SpectralConv, WeightNormConv2d
from nvae.models.normalization import BatchNorm
from nvae.regularizers import SpectralNorm, batchnorm_penalty, spectral_convs


def convs() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(
        [
            WeightNormConv2d(4, 8, 3),
            WeightNormConv2d(4, 8, 3),
            PlainConv2d(4, 8, 1),
            PlainConv2d(8, 8, 5, groups=8),
            FactorizedSkip(4, 9),
            Flow(2, 1),
        ]
    ).double()


def exact(module: nn.Module) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for conv in spectral_convs(module):
        for matrix in conv.spectral_matrices():
            weight = matrix.weight
            if matrix.log_gain is not None:
                scale = matrix.log_gain.exp() / (weight.norm(dim=1) + 1e-5)
                weight = weight * scale[:, None]
            total = total + torch.linalg.matrix_norm(weight, 2)
    return total


def test_sum_of_largest_singular_values() -> None:
    """Against the SVD, for plain, normalized, masked, depthwise and factorized convolutions."""
    module = convs()
    spectral = SpectralNorm(spectral_convs(module), warmup_iterations=500)
    assert spectral().item() == pytest.approx(exact(module).item(), rel=1e-9)


def test_gradient_is_that_of_the_singular_values() -> None:
    """The closed form, through the weights and the gains, against autograd through the SVD."""
    module = convs()
    spectral = SpectralNorm(spectral_convs(module), warmup_iterations=2000)
    parameters = [p for p in module.parameters() if p.ndim > 1 or p.shape[0] != 1]
    ours = torch.autograd.grad(spectral(), parameters, allow_unused=True)
    theirs = torch.autograd.grad(exact(module), parameters, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_the_memory_format_does_not_matter() -> None:
    """channels_last permutes the columns; singular values are the same."""
    module = convs()
    plain = SpectralNorm(spectral_convs(module), warmup_iterations=500)().item()
    module.to(memory_format=torch.channels_last)
    last = SpectralNorm(spectral_convs(module), warmup_iterations=500)().item()
    assert last == pytest.approx(plain, rel=1e-9)


def test_vectors_are_kept_and_saved() -> None:
    """Few iterations a step follow slowly moving weights only if the vectors survive a save."""
    module = convs()
    spectral = SpectralNorm(spectral_convs(module))
    spectral()
    restored = SpectralNorm(spectral_convs(module), iterations=1)
    restored.load_state_dict(spectral.state_dict())
    assert restored().item() == pytest.approx(exact(module).item(), rel=1e-3)
    assert bool(restored.started)


def test_every_convolution_is_counted_once() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = WeightNormConv2d(2, 2, 1)
            self.linear = nn.Linear(2, 2)

    found = spectral_convs(Two())
    assert len(found) == 1
    assert isinstance(found[0], SpectralConv)


def test_batchnorm_penalty_is_the_sum_of_maxima() -> None:
    norms = [BatchNorm(3), BatchNorm(3), BatchNorm(5)]
    with torch.no_grad():
        norms[0].weight.copy_(torch.tensor([0.5, -2.0, 1.0]))
        norms[2].weight.fill_(0.25)
    assert batchnorm_penalty(norms).item() == pytest.approx(2.0 + 1.0 + 0.25)
