import pytest
import torch
from torch import Tensor

from nvae.ops.weight_norm import (
    weight_norm,
    weight_norm_reference,
    weight_norms,
    weight_norms_backward_formula,
    weight_norms_backward_kernel,
    weight_norms_formula,
    weight_norms_kernel,
)

from .host import HostLauncher


def test_closed_form_gradient() -> None:
    """Against autograd through the formula, in either memory format."""
    torch.manual_seed(0)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        w = torch.randn(4, 3, 3, 3, dtype=torch.float64).to(memory_format=memory_format)
        w.requires_grad_()
        g = torch.randn(4, dtype=torch.float64, requires_grad=True)
        grad = torch.randn(4, 3, 3, 3, dtype=torch.float64)
        torch.testing.assert_close(weight_norm(w, g), weight_norm_reference(w, g))
        for ours, theirs in zip(
            torch.autograd.grad(weight_norm(w, g), (w, g), grad),
            torch.autograd.grad(weight_norm_reference(w, g), (w, g), grad),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)


def test_gradcheck() -> None:
    w = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    g = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(weight_norm, (w, g))


def test_a_zero_row_has_a_finite_gradient() -> None:
    """A dead output channel must not turn the step into NaN."""
    w = torch.zeros(2, 3, requires_grad=True)
    g = torch.zeros(2, requires_grad=True)
    weight_norm(w, g).sum().backward()
    assert w.grad is not None
    assert torch.isfinite(w.grad).all()


SHAPES = [(4, 3, 3, 3), (9, 1, 5, 5), (17, 40, 1, 1), (1, 70), (8, 8, 3, 3)]


def convolutions(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    """Weights, one of them channels_last, one with a row of zeros; gains."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(s, generator=generator, dtype=dtype) for s in SHAPES]
    weights[0] = weights[0].contiguous(memory_format=torch.channels_last)
    weights[1][3] = 0
    gains = [torch.randn(s[0], generator=generator, dtype=dtype) for s in SHAPES]
    return weights, gains


def check_weight_norms(launcher: HostLauncher, dtype: torch.dtype = torch.float32) -> None:
    """Forward and backward kernel against the formula in float64."""
    close = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    weights, gains = convolutions()
    wide = [[t.double() for t in each] for each in (weights, gains)]
    normalized, norms, scales = weight_norms_kernel(weights, gains, dtype, launcher)
    want, wide_norms, wide_scales = weight_norms_formula(*wide, torch.float64)
    assert all(n.dtype == dtype for n in normalized)
    for got, expected in zip(normalized, want, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=close, atol=close)
    torch.testing.assert_close(norms.double(), wide_norms, rtol=1e-5, atol=1e-6)
    rows = [len(w) for w in weights]
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(s, generator=generator).to(dtype) for s in SHAPES]
    got = weight_norms_backward_kernel(
        gradients, weights, list(norms.split(rows)), list(scales.split(rows)), launcher
    )
    expected = weight_norms_backward_formula(
        [g.double() for g in gradients], wide[0], list(wide_norms.split(rows)),
        list(wide_scales.split(rows)),
    )  # fmt: skip
    for ours, theirs in zip((*got[0], *got[1]), (*expected[0], *expected[1]), strict=True):
        assert ours.dtype == torch.float32
        assert ours.isfinite().all()
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_at_once_by_the_kernel(host: HostLauncher, dtype: torch.dtype) -> None:
    check_weight_norms(host, dtype)
    assert len(host.launches) == 2


def test_all_at_once_equals_one_by_one() -> None:
    """Values and gradients bit for bit on the formula's path, and none for what nobody used."""
    weights, gains = convolutions(torch.float64)
    leaves = [t.requires_grad_() for t in (*weights, *gains)]
    together = weight_norms(weights, gains, torch.float64)
    apart = [weight_norm(w, g) for w, g in zip(weights, gains, strict=True)]
    for a, b in zip(together, apart, strict=True):
        assert torch.equal(a, b)
    losses = [sum((w**3).sum() for w in each[1:]) for each in (together, apart)]
    first, second = (torch.autograd.grad(loss, leaves, allow_unused=True) for loss in losses)
    assert first[0] is second[0] is None
    for a, b in zip(first, second, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_gradcheck_all_at_once() -> None:
    weights = [torch.randn(3, 5, dtype=torch.float64), torch.randn(2, 1, 3, 3, dtype=torch.float64)]
    gains = [torch.randn(len(w), dtype=torch.float64) for w in weights]
    leaves = [t.requires_grad_() for t in (*weights, *gains)]
    assert torch.autograd.gradcheck(
        lambda *t: tuple(weight_norms(t[:2], t[2:], torch.float64)), leaves
    )


def test_a_gradient_in_another_layout_is_put_right(host: HostLauncher) -> None:
    weights, gains = convolutions()
    _, norms, scales = weight_norms_kernel(weights, gains, torch.float32, host)
    gradient = torch.randn(SHAPES[0])
    arguments = [weights[0]], [norms[:4]], [scales[:4]]
    a = weight_norms_backward_kernel([gradient], *arguments, host)
    laid_out = gradient.contiguous(memory_format=torch.channels_last)
    b = weight_norms_backward_kernel([laid_out], *arguments, host)
    assert torch.equal(a[0][0], b[0][0])
    assert torch.equal(a[1][0], b[1][0])
