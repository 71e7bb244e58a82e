import pytest
import torch

from nvae.models.flows import AutoregressiveShift, Flow, autoregressive_mask, channel_mask


@pytest.mark.parametrize("mirrored", [False, True])
def test_jacobian_is_unit_triangular(mirrored: bool) -> None:
    """Pixel by pixel, channel by channel in order: ones on the diagonal, zeros above."""
    torch.manual_seed(0)
    shift = AutoregressiveShift(3, mirrored).double()
    with torch.no_grad():
        shift.mean.log_gain.add_(3)  # a visible dependence
    z = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(shift, z)
    # (pixels, channels) is the order of dependence; mirrored, the pixels run backwards
    jacobian = jacobian.view(3, 16, 3, 16).permute(1, 0, 3, 2)
    if mirrored:
        jacobian = jacobian.flip(0, 2)
    matrix = jacobian.reshape(48, 48)
    torch.testing.assert_close(matrix.diagonal(), torch.ones(48, dtype=torch.float64))
    assert matrix.triu(1).abs().max() == 0
    assert matrix.tril(-1).abs().max() > 1e-3


def test_flow_preserves_volume() -> None:
    torch.manual_seed(0)
    flow = Flow(2, 2).double()
    z = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(flow, z).view(18, 18)
    assert torch.linalg.det(jacobian).item() == pytest.approx(1.0, rel=1e-10)


def test_channel_masks() -> None:
    """Blocks of r: the definition, written out for both directions."""
    assert channel_mask(2, 4, strict=False).tolist() == [[1, 0], [1, 0], [1, 1], [1, 1]]
    assert channel_mask(2, 4, strict=True).tolist() == [[0, 0], [0, 0], [1, 0], [1, 0]]
    assert channel_mask(4, 2, strict=False).tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert channel_mask(4, 2, strict=True).tolist() == [[0, 0, 0, 0], [1, 1, 0, 0]]


def test_spatial_mask() -> None:
    mask = autoregressive_mask(1, 1, 3, depthwise=True, strict=True)[0, 0]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    mirrored = autoregressive_mask(1, 1, 3, depthwise=True, mirrored=True)[0, 0]
    assert mirrored.tolist() == [[0, 0, 0], [0, 1, 1], [1, 1, 1]]
