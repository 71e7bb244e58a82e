"""Recomputing cells must change memory and nothing else."""

import copy

import torch

from nvae.models import NVAE, ModelConfig
from nvae.objective import Objective, ObjectiveConfig
from nvae.training.recompute import compile_blocks, recompute_segments

CONFIG = ModelConfig(
    image_size=8, num_scales=2, groups_per_scale=2, preprocess_blocks=1, preprocess_cells=2,
    postprocess_cells=2, encoder_channels=8, decoder_channels=8, latent_channels=2,
)  # fmt: skip


def _step(model: NVAE) -> tuple[torch.Tensor, int]:
    """A forward and backward pass in float64; its loss and the bytes kept between the two."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(4, 1, 8, 8, generator=generator, dtype=torch.float64).round()
    noise = model.draw_noise(4, generator)
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        objective = Objective(model, ObjectiveConfig())
        loss = objective(model, x, noise, step=15, total_steps=100, regularize=False).data
    held = sum(kept.values())
    loss.backward()
    return loss, held


def test_equals_plain_training_pass() -> None:
    """Loss, gradients, running statistics and names agree; less is held for backward."""
    torch.manual_seed(0)
    plain = NVAE(CONFIG).double()
    recomputed = copy.deepcopy(plain)
    recompute_segments(recomputed)
    (loss_a, held_a), (loss_b, held_b) = _step(plain), _step(recomputed)
    assert torch.equal(loss_a, loss_b)
    assert held_b < 0.6 * held_a
    for (name, p), q in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            assert q.grad is not None
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14, msg=name)
    a, b = plain.state_dict(), recomputed.state_dict()
    assert a.keys() == b.keys()
    moved = 0
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, msg=name)
        moved += "running_mean" in name and bool(a[name].any())
    assert moved > 10


def test_copy_recomputes_its_own_weights() -> None:
    """A deep copy (the weights' average) must not run the original's cells."""
    torch.manual_seed(0)
    model = NVAE(CONFIG).double()
    recompute_segments(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    x = torch.zeros(2, 1, 8, 8, dtype=torch.float64)
    assert not copied(x).logits.any()
    assert model(x).logits.any()


def test_compiled_cells_keep_their_names_and_numbers() -> None:
    """Also where they are recomputed in the backward pass; Dynamo traces, nothing is generated."""
    config = ModelConfig(
        image_size=8, num_scales=1, groups_per_scale=2, preprocess_blocks=1, preprocess_cells=1,
        postprocess_cells=1, encoder_channels=4, decoder_channels=4, latent_channels=2,
        encoder_cells_per_group=1, decoder_cells_per_group=1,
    )  # fmt: skip
    torch.manual_seed(0)
    plain = NVAE(config)
    compiled = NVAE(config)
    compiled.load_state_dict(plain.state_dict())
    compile_blocks(compiled, backend="aot_eager")
    recompute_segments(compiled)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    x = torch.rand(2, 1, 8, 8).round()
    noise = plain.draw_noise(2)
    for model in (plain, compiled):
        output = model(x, noise)
        (output.logits.sum() + output.kl_per_group.sum()).backward()
    for (name, p), q in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        if p.grad is not None:
            assert q.grad is not None
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-4, msg=name)
    for (name, p), q in zip(plain.named_buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-5, msg=name)


def test_every_kind_of_cell_is_compiled() -> None:
    """More kinds, widths and modes than Dynamo's default limit of graphs for one function.

    Beyond it cells would run uncompiled, and nothing but a warning would say so.
    """
    config = ModelConfig(
        image_size=16, num_scales=3, groups_per_scale=2, adaptive_groups=False,
        preprocess_blocks=1, preprocess_cells=2, postprocess_cells=2, encoder_channels=4,
        decoder_channels=4, latent_channels=2, encoder_cells_per_group=1,
        decoder_cells_per_group=1,
    )  # fmt: skip
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = NVAE(config)
    compile_blocks(model, backend="eager")
    x = torch.rand(2, 1, 16, 16).round()
    model(x)
    model.eval()
    with torch.no_grad():
        model(x)
    counters = torch._dynamo.utils.counters
    assert counters["frames"]["ok"] == counters["frames"]["total"] > 8
    assert not counters["graph_break"]
    assert not counters["unimplemented"]
