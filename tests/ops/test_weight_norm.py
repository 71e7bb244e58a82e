import torch

from nvae.ops.weight_norm import weight_norm, weight_norm_reference


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
