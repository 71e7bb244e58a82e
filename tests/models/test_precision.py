"""What runs in what under mixed precision: the table of docs/training.md, "Precision".

A GPU's rules for autocast apply to tensors without storage too, so they are held here without one;
the CPU has another list of operations, which does not widen upsampling.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nvae.models import NVAE
from nvae.models.distributions import Normal
from nvae.models.folding import fold
from nvae.models.latent_group import LatentGroup, NormalHead
from nvae.models.layers import DataInitConv2d, PlainConv2d, WeightNormConv2d
from nvae.objective import Objective, ObjectiveConfig
from nvae.ops.library import assuming_kernels
from nvae.training.memory import on_traced_gpu
from tests.models.small import small_model

BF16, FLOAT32 = torch.bfloat16, torch.float32


@contextmanager
def gpu_autocast() -> Iterator[None]:
    """``torch.autocast("cuda", torch.bfloat16)``, which turns itself off where there is no GPU."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", BF16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


class Types:
    """The types of what modules take first and of what they give, by kind, over a pass."""

    def __init__(self, model: NVAE) -> None:
        self.inputs: dict[str, set[torch.dtype]] = defaultdict(set)
        self.outputs: dict[str, set[torch.dtype]] = defaultdict(set)
        heads = [*(m for m in model.modules() if isinstance(m, NormalHead)), model.image_head]
        inside = {m for head in heads for m in head.modules()}
        for module in model.modules():
            if module in heads or module not in inside:
                module.register_forward_hook(self._record(module in heads))

    def _record(self, is_head: bool) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            for kind in ["head"] if is_head else _kinds(module):
                self.inputs[kind] |= {a.dtype for a in arguments[:1]}
                self.outputs[kind] |= {t.dtype for t in outputs if isinstance(t, Tensor)}

        return hook


def _kinds(module: nn.Module) -> list[str]:
    kinds = [type(module).__name__]
    if isinstance(module, PlainConv2d | WeightNormConv2d):
        kinds.append("convolution")
        if module.groups > 1:
            kinds.append("depthwise or grouped")
    return kinds


@pytest.mark.parametrize(
    ("family", "kernels"),
    [("res_mbconv", False), ("res_mbconv", True), ("mbconv_res", True), ("res_elu", True)],
)
def test_what_runs_in_what_in_training(family: str, kernels: bool) -> None:
    """The residual stream and what convolutions take stay bfloat16; heads and densities do not.

    By a GPU's own rules upsampling made both float32 from each change of scale on.
    """
    with FakeTensorMode(), assuming_kernels(kernels):
        model = on_traced_gpu(small_model(num_flows=1, cell_family=family))
        assert isinstance(model, NVAE)
        for module in model.modules():
            if isinstance(module, DataInitConv2d):
                module.checked = True
        objective = Objective(model, ObjectiveConfig()).to("cuda")
        assert objective.spectral_norm is not None
        objective.spectral_norm.is_warm = True
        types = Types(model)
        x = torch.rand(2, 1, 16, 16, device="cuda")
        with gpu_autocast():
            output = model(x, model.draw_noise(2))
            log_likelihood = model.likelihood(output.logits).log_prob(x)
            loss = objective(model, x, model.draw_noise(2), step=1, total_steps=10)
    assert types.inputs["Cell"] == types.outputs["Cell"] == {BF16}
    assert types.outputs["convolution"] == types.outputs["UpsampleSkip"] == {BF16}
    assert types.outputs["Linear"] == {BF16}
    normalized = set() if family == "res_elu" else {BF16}
    assert types.inputs["BatchNorm"] == types.outputs["BatchNorm"] == normalized
    assert types.inputs["depthwise or grouped"] == {BF16}
    assert types.outputs["head"] == {FLOAT32}
    for group in output.groups:
        assert group.posterior is not None
        for value in (group.z, group.prior.mean, group.posterior.sigma, group.kl):
            assert value.dtype == FLOAT32
    assert loss.penalty is not None
    numbers = (output.kl_per_group, output.logits, log_likelihood, loss.data, loss.penalty)
    assert {number.dtype for number in numbers} == {FLOAT32}
    assert {b.dtype for n, b in model.named_buffers() if "running" in n} <= {FLOAT32}


def test_folded_cells_stay_in_the_lower_type() -> None:
    """Validation goes through cells with folded normalizations."""
    with FakeTensorMode(), assuming_kernels(True), torch.no_grad():
        model = on_traced_gpu(small_model()).eval()
        assert isinstance(model, NVAE)
        fold(model)
        types = Types(model)
        with gpu_autocast():
            output = model(torch.rand(2, 1, 16, 16, device="cuda"), model.draw_noise(2))
    assert types.inputs["UpsampleNearest"] == types.outputs["UpsampleNearest"] == {BF16}
    assert types.inputs["Cell"] == types.outputs["Cell"] == {BF16}
    assert types.outputs["head"] == {output.logits.dtype} == {FLOAT32}


def _narrow(model: NVAE) -> None:
    """Weights as late in training: priors at the clamp's lower end, far means, small offsets."""
    latent = model.config.latent_channels
    with torch.no_grad():
        for group in model.groups:
            assert isinstance(group, LatentGroup)
            group.posterior.conv.log_gain -= 3
            if group.prior is not None:
                group.prior.conv.bias[latent:] = -9.0  # type: ignore[index]
                group.prior.conv.bias[:latent] = torch.linspace(-4, 4, latent)  # type: ignore[index]


def test_mixed_precision_costs_no_nats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prior, posterior and KL of a bfloat16 pass are those of float32 on the same features.

    With heads and sum in bfloat16 a mean was off by up to 0.9 sigma, and a group's KL by as much
    as a few nats; what is left is the order of float32 sums.
    """
    torch.manual_seed(0)
    model = small_model(latent_channels=8, encoder_channels=16, decoder_channels=16).train()
    _narrow(model)
    seen: list[tuple[Normal, Normal, Normal, Normal]] = []
    posterior_of = LatentGroup._posterior

    def recorded(
        group: LatentGroup, state: Tensor, features: Tensor, parameters: tuple[Tensor, Tensor]
    ) -> Normal:
        found = posterior_of(group, state, features, parameters)
        if group.prior is not None and group.merge_encoder is not None:
            assert state.dtype == features.dtype == BF16
            merged = features + group.merge_encoder(state)
            with torch.autocast("cpu", enabled=False):
                prior = group.prior(state.float())
                offset = group.posterior(merged.float())
            expected = Normal.from_parameters(prior[0] + offset[0], prior[1] + offset[1])
            used = Normal.from_parameters(*parameters)
            seen.append((found, used, Normal.from_parameters(*prior), expected))
        return found

    monkeypatch.setattr(LatentGroup, "_posterior", recorded)
    x = torch.rand(4, 1, 16, 16).round()
    with torch.no_grad(), torch.autocast("cpu", BF16):
        model(x, model.draw_noise(4))
    assert len(seen) == 2
    for found, used, prior, posterior in seen:
        assert prior.sigma.min() < 0.03
        error = (found.mean - posterior.mean) / posterior.sigma
        assert error.abs().max() < 1e-3
        torch.testing.assert_close(found.sigma, posterior.sigma, rtol=1e-5, atol=0)
        wanted = posterior.kl(prior)
        assert (found.kl(used) - wanted).abs().sum() < 1e-3 * wanted.sum()


def test_z_is_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder's convolution takes the float32 draw as its own type has it, and no worse."""
    torch.manual_seed(0)
    model = small_model().train()
    taken: dict[int, Tensor] = {}
    for index, group in enumerate(model.groups):
        assert isinstance(group, LatentGroup)

        def hook(_: nn.Module, arguments: tuple[Tensor, ...], index: int = index) -> None:
            taken[index] = arguments[0][:, -model.latent_channels :]

        group.merge_latent.register_forward_pre_hook(hook)
    with torch.no_grad(), torch.autocast("cpu", BF16):
        output = model(torch.rand(2, 1, 16, 16).round(), model.draw_noise(2))
    for index, sample in enumerate(output.groups):
        assert sample.z.dtype == FLOAT32
        assert torch.equal(taken[index].bfloat16(), sample.z.bfloat16())


def test_a_float32_pass_enters_no_autocast() -> None:
    """Nothing to leave where nothing is on: an exported program would carry the context along."""
    model = small_model().train()
    x = torch.rand(2, 1, 16, 16).round()
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "autocast", None)
        assert model(x, model.draw_noise(2)).logits.dtype == FLOAT32
