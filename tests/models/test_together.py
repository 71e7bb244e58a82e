"""What is made of the weights for many layers at once must be what every layer would have made."""

import copy

import pytest
import torch
from torch import Tensor, nn

from nvae.models import NVAE, ModelConfig, together
from nvae.models.layers import DataInitConv2d
from nvae.objective import Objective, ObjectiveConfig
from nvae.ops.multi_tensor import laid_out_like
from nvae.training.recompute import recompute_segments

CONFIG = ModelConfig(
    image_size=8, num_scales=2, groups_per_scale=2, preprocess_blocks=1, preprocess_cells=1,
    postprocess_cells=1, encoder_channels=4, decoder_channels=4, latent_channels=2, num_flows=1,
    encoder_cells_per_group=1, decoder_cells_per_group=1,
)  # fmt: skip


def _gradients(
    model: NVAE, dtype: torch.dtype = torch.bfloat16, regularize: bool = True
) -> dict[str, Tensor | None]:
    """Of a micro-batch's loss, from spectral vectors that have converged."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(4, 1, 8, 8, generator=generator).round()
    noise = model.draw_noise(4, generator)
    objective = Objective(model, ObjectiveConfig())
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = objective(model, x, noise, step=15, total_steps=100, regularize=regularize)
    model.zero_grad()
    (loss.data if loss.penalty is None else loss.data + loss.penalty).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def _model(**changes: object) -> NVAE:
    torch.manual_seed(0)
    return NVAE(ModelConfig.from_dict({**CONFIG.to_dict(), **changes}))


def _assert_same(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> None:
    for name, gradient in ours.items():
        other = theirs[name]
        assert (gradient is None) == (other is None), name
        assert gradient is None or other is None or torch.equal(gradient, other), name


@pytest.mark.parametrize("regularize", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_are_the_same_bits(
    dtype: torch.dtype, regularize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With masks, gains, biases, attention, plain convolutions and both regularizers."""
    model = _model()
    apart = _gradients(model, dtype, regularize)
    monkeypatch.setattr(together, "has_kernels", lambda device: True)
    _assert_same(apart, _gradients(model, dtype, regularize))


def test_a_layer_that_its_first_batch_initializes_is_recomputed_as_it_is_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was made of its weights before would be of other gains than the first pass took."""
    monkeypatch.setattr(together, "has_kernels", lambda device: True)
    plain = _model(cell_family="res_elu")
    recomputed = copy.deepcopy(plain)
    recompute_segments(recomputed)
    _assert_same(_gradients(plain, torch.float32), _gradients(recomputed, torch.float32))


def test_recomputed_segments_find_the_first_pass_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding again would be right but wasteful; normalizing again would not even run."""
    monkeypatch.setattr(together, "has_kernels", lambda device: True)
    plain = _model()
    recomputed = copy.deepcopy(plain)
    recompute_segments(recomputed)
    expected = _gradients(plain)
    rounded = 0
    original = together._in_type

    def counted(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        nonlocal rounded
        rounded += dtype == torch.bfloat16
        return original(tensors, dtype)

    monkeypatch.setattr(together, "_in_type", counted)
    _assert_same(expected, _gradients(recomputed))
    assert rounded == 2  # plain convolutions; biases and attention


def test_layers_hold_their_parameters_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a pass, after the regularizers, and after a pass that failed."""
    monkeypatch.setattr(together, "has_kernels", lambda device: True)
    model = _model()
    before = [(m, dict(m._parameters), dict(m._buffers)) for m in model.modules()]

    def assert_restored() -> None:
        for module, parameters, buffers in before:
            for now, then in ((module._parameters, parameters), (module._buffers, buffers)):
                assert {k: id(v) for k, v in now.items()} == {k: id(v) for k, v in then.items()}
        assert not together.handed_in(model)

    with torch.autocast("cpu", torch.bfloat16), model.training_pass() as for_regularizers:
        assert len(together.handed_in(model)) > 50
        assert isinstance(next(model.parameters()), nn.Parameter)
    assert_restored()
    with for_regularizers:
        assert together.handed_in(model)
    assert_restored()
    with pytest.raises(ValueError, match="shape"), model.training_pass():
        model(torch.zeros(1, 1, 3, 3))
    assert_restored()


def test_gradients_arrive_while_others_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several ranks exchange the first of them meanwhile: the last layers' are there at half time.

    Autograd would put off what made the weights ready to the end, since it was done first.
    """
    monkeypatch.setattr(together, "has_kernels", lambda device: True)
    monkeypatch.setattr(together, "AT_ONCE", 8)
    monkeypatch.setattr(together, "TENSORS_AT_ONCE", 8)
    model = _model()
    events: list[str] = []
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: events.append(name))

    def watch(module: nn.Module, inputs: object, output: Tensor) -> None:
        output.register_hook(lambda _: events.append("top of the encoder"))

    model.encoder.top.register_forward_hook(watch)
    _gradients(model)
    decoded = events[: events.index("top of the encoder")]
    late = [name for name, _ in model.named_parameters() if name.startswith("postprocess")]
    assert set(late) <= set(decoded)
    assert not any(name.startswith("encoder") for name in decoded)
    assert len(events) > len(decoded) + 50


def test_first_batch_sets_the_parameters_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gain and bias of a cell without batch normalization, though the pass works on copies."""
    model = _model(cell_family="res_elu")
    other = copy.deepcopy(model)
    expected = _gradients(model)
    monkeypatch.setattr(together, "has_kernels", lambda device: True)
    _assert_same(expected, _gradients(other))
    initialized = [m for m in other.modules() if isinstance(m, DataInitConv2d)]
    assert all(bool(m.bias.any()) for m in initialized if m.bias is not None)
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_frozen_weights_get_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "has_kernels", lambda device: True)
    model = _model()
    model.encoder.requires_grad_(False)
    gradients = _gradients(model)
    assert all((g is None) == name.startswith("encoder") for name, g in gradients.items())


def test_layouts_that_differ_in_name_only_are_not_copied() -> None:
    """A 1x1 weight's strides over its one pixel are anything; the rest is put in order."""
    like = torch.randn(6, 4, 1, 1).contiguous(memory_format=torch.channels_last)
    like = like.as_strided(like.shape, (4, 1, 4, 4))
    tensor = torch.randn(6, 4).view(6, 4, 1, 1)
    assert tensor.stride() != like.stride()
    same = laid_out_like(like, tensor)
    assert same.stride() == like.stride()
    assert same.data_ptr() == tensor.data_ptr()
    assert torch.equal(same, tensor)
    wide = torch.randn(6, 4, 3, 3)
    moved = laid_out_like(wide.contiguous(memory_format=torch.channels_last), wide.half())
    assert moved.is_contiguous(memory_format=torch.channels_last)
    assert moved.dtype == torch.half
    assert torch.equal(moved, wide.half())
