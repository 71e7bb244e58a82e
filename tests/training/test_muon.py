"""Orthogonalized momentum: its mathematics, what it moves, the switch, resuming."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from nvae.models.config import ModelConfig
from nvae.models.nvae import NVAE
from nvae.training.muon import Muon, is_matrix, orthogonalized
from nvae.training.optimizers import Adamax, HostSwitch, OptimizerConfig, build_optimizer
from tests.training.runs import StopAt, assert_identical, last_checkpoint, run, small_config

NAME = "nvae.training.muon:Muon"


@pytest.mark.parametrize("shape", [(3, 8, 40), (2, 40, 8), (1, 16, 16)])
def test_orthogonalized_has_equal_singular_values_and_the_same_vectors(
    shape: tuple[int, int, int],
) -> None:
    """Against U V^T of the singular value decomposition."""
    g = torch.Generator().manual_seed(0)
    matrices = torch.randn(shape, generator=g, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    inside = u.transpose(1, 2) @ orthogonalized(matrices) @ vh.transpose(1, 2)
    values = inside.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.65
    assert values.max() < 1.25
    assert (inside - torch.diag_embed(values)).abs().max() < 1e-9


def test_matrices_move_as_by_torch() -> None:
    """torch's own, for two-dimensional weights; it iterates in bfloat16."""
    g = torch.Generator().manual_seed(1)
    ours, theirs = (nn.Parameter(torch.zeros(24, 12)) for _ in range(2))
    mine = Muon([ours], lr=0.1, momentum=0.9)
    reference = torch.optim.Muon([theirs], lr=0.1, momentum=0.9, weight_decay=0.0)
    for _ in range(4):
        ours.grad = torch.randn(24, 12, generator=g)
        theirs.grad = ours.grad.clone()
        before = ours.detach().clone(), theirs.detach().clone()
        mine.step()
        reference.step()
        moved, expected = (ours - before[0]).flatten(), (theirs - before[1]).flatten()
        assert torch.cosine_similarity(moved, expected, dim=0) > 0.999
        assert (moved.norm() / expected.norm()).item() == pytest.approx(1, abs=0.02)


def test_a_convolution_moves_as_its_matrix_in_either_memory_format() -> None:
    g = torch.Generator().manual_seed(2)
    gradient = torch.randn(6, 4, 3, 3, generator=g)
    rows = nn.Parameter(torch.zeros(6, 36))
    rows.grad = gradient.flatten(1).clone()
    Muon([rows], lr=0.1).step()
    for memory in (torch.contiguous_format, torch.channels_last):
        weight = nn.Parameter(torch.zeros(6, 4, 3, 3).to(memory_format=memory))
        weight.grad = gradient.to(memory_format=memory)
        Muon([weight], lr=0.1).step()
        torch.testing.assert_close(weight.flatten(1), rows)


def test_all_else_moves_by_adamax_at_its_own_rate() -> None:
    """Bits of Adamax, over steps, beside a matrix in the same group."""
    g = torch.Generator().manual_seed(3)
    bias, twin = (nn.Parameter(torch.ones(5)) for _ in range(2))
    matrix = nn.Parameter(torch.ones(5, 5))
    muon = Muon([matrix, bias], lr=0.04, others=0.5, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.1)
    adamax = Adamax([twin], lr=0.02, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.1)
    for _ in range(3):
        bias.grad = torch.randn(5, generator=g)
        twin.grad = bias.grad.clone()
        matrix.grad = torch.randn(5, 5, generator=g)
        muon.step()
        adamax.step()
        assert torch.equal(bias, twin)
    assert muon.param_groups[0]["step"] == 3


def test_matrices_are_what_mixes_channels() -> None:
    """In an NVAE: no depthwise convolution, gain, bias or learned state, nor the gray head."""
    config = ModelConfig(
        image_size=8,
        groups_per_scale=2,
        encoder_channels=4,
        decoder_channels=4,
        preprocess_blocks=1,
    )
    names = {name for name, p in NVAE(config).named_parameters() if is_matrix(p)}
    assert {n.rpartition(".")[2] for n in names} == {"weight"}
    assert not any("norm" in n or "spatial" in n or "image_head" in n for n in names)
    kept = ("expand", "project", "conv", "reduce", "posterior", "prior", "merge_latent")
    assert all(any(part in n for n in names) for part in kept)


def test_a_bad_step_is_left_out_and_state_goes_on_after_loading() -> None:
    """By the name that configs/optimizer/muon.yaml gives, with its arguments."""
    config = OptimizerConfig(
        name=NAME, learning_rate=0.05,
        arguments={"momentum": 0.9, "others": 0.4},
    )  # fmt: skip
    g = torch.Generator().manual_seed(4)
    weights = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4))]
    optimizer = build_optimizer(config, weights)
    assert isinstance(optimizer, HostSwitch)
    gradients = [[torch.randn(w.shape, generator=g) for w in weights] for _ in range(3)]

    def step(flag: float, which: int) -> None:
        for weight, gradient in zip(weights, gradients[which], strict=True):
            weight.grad = gradient.clone() if not flag else torch.full_like(weight, torch.nan)
        optimizer.found_inf = torch.tensor(flag)  # type: ignore[attr-defined]
        optimizer.step()

    step(0.0, 0)
    before = copy.deepcopy((weights, optimizer.state_dict()))
    step(1.0, 1)
    assert all(torch.equal(a, b) for a, b in zip(weights, before[0], strict=True))
    step(0.0, 2)
    after = [w.detach().clone() for w in weights]

    weights = before[0]
    optimizer = build_optimizer(config, weights)
    optimizer.load_state_dict(before[1])
    step(0.0, 2)
    assert all(torch.equal(a, b) for a, b in zip(weights, after, strict=True))


@pytest.mark.parametrize(
    ("argument", "value"), [("momentum", 1.0), ("others", -1.0), ("iterations", 0)]
)
def test_impossible_arguments_are_named(argument: str, value: float) -> None:
    """By the configuration, before anything is made."""
    with pytest.raises(ValueError, match=f"does not take these arguments: {argument} is {value}"):
        OptimizerConfig(name=NAME, arguments={argument: value})


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """Weights and the optimizer's state of both kinds, bit for bit, from the middle of an epoch."""
    muon = OptimizerConfig(name=NAME, learning_rate=0.05, warmup_epochs=1)
    weights = []
    for name, stops in (("whole", ()), ("stopped", (5,))):
        config = small_config(tmp_path, name=name, optimizer=muon)
        config.trainer.max_epochs = 1
        for step in stops:
            run(config, StopAt(step))
        folder, trainer = run(config)
        assert trainer.global_step == 8
        weights.append(last_checkpoint(folder))
    for key in ("state_dict", "optimizer_states"):
        assert assert_identical(weights[0][key], weights[1][key]) > 100
