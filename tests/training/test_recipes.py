"""The other families' recipes, step by step: schedules, balancing, and five steps of training."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR

from nvae.models import HierarchicalVAE
from nvae.objective import GammaBalanced, Objective, ObjectiveConfig, gamma_weights
from nvae.training.ema import MovingAverage
from nvae.training.guard import BadSteps
from nvae.training.module import NVAELightning
from nvae.training.optimizers import OptimizerConfig, build_optimizer
from nvae.training.schedule import learning_rate_factor
from nvae.training.whole_step import StepInput, StepPosition, WholeStep
from tests.reference import FOLDER
from tests.reference.very_deep import Numbers, channels_first

SCHEDULES = np.load(FOLDER / "evdvae_schedules.expected.npz")


def test_learning_rate_of_evdvae() -> None:
    """A step earlier than theirs, whose first has rate 0; and at the minimum where theirs rises."""
    config = OptimizerConfig(
        learning_rate=1e-3, min_learning_rate=2e-4, warmup_steps=10, decay_start=50 / 400,
        decay_end=300 / 400,
    )  # fmt: skip
    factor = learning_rate_factor(config, 40, 400)
    ours = [1e-3 * factor(t - 1) for t in range(400)]
    np.testing.assert_allclose(ours[:301], SCHEDULES["lr_cosine"][:301], rtol=1e-10)
    assert ours[300:] == pytest.approx([2e-4] * 100)
    assert SCHEDULES["lr_cosine"][-1] > 2.5e-4


def test_constant_learning_rate() -> None:
    """VDVAE's, and Efficient-VDVAE's other one."""
    config = OptimizerConfig(learning_rate=1e-3, min_learning_rate=1e-3, warmup_steps=10)
    factor = learning_rate_factor(config, 40, 1000)
    ours = [1e-3 * factor(t - 1) for t in range(60)]
    np.testing.assert_allclose(ours, SCHEDULES["lr_constant"], rtol=1e-12)


def evdvae_objective(numbers: Numbers, total: int) -> GammaBalanced:
    """As the presets have it for a run of so many steps."""
    config = ObjectiveConfig(
        name="gamma_balanced", kl_balancing=False, spectral_weight=0, per_dimension=True,
        kl_anneal_portion=5021 / total, kl_constant_portion=21 / total,
        options={"portion": 10000 / total},
    )  # fmt: skip
    return GammaBalanced(numbers.model, config)


@pytest.mark.parametrize("total", [500_000, 800_000, 900_000])
def test_kl_coefficient_of_evdvae(total: int) -> None:
    objective = evdvae_objective(Numbers("evdvae"), total)
    ours = [objective.beta(int(step), total) for step in SCHEDULES["beta_steps"]]
    np.testing.assert_allclose(ours, SCHEDULES["beta_linear"], rtol=1e-9)
    lasts = [objective.coefficients(step, total)["gamma"] for step in (0, 9999, 10000, 10001)]
    assert lasts == [1, 1, 1, 0]


def test_gamma_balancing() -> None:
    """By KL per latent variable, by KL, and none; the numbers are nats and bits of one batch."""
    kl = torch.from_numpy(SCHEDULES["gamma_kl_nats_per_dim"])[None]
    variables = kl[0] / torch.from_numpy(SCHEDULES["gamma_kl_rate_bits"])  # ln 2 cancels
    balanced = (gamma_weights(kl, variables) * kl).sum()
    assert float(balanced) == pytest.approx(float(SCHEDULES["gamma_scaled_True"]), rel=1e-10)
    balanced = (gamma_weights(kl, torch.ones(5)) * kl).sum()
    assert float(balanced) == pytest.approx(float(SCHEDULES["gamma_scaled_False"]), rel=1e-10)
    assert float(kl.sum()) == pytest.approx(float(SCHEDULES["gamma_off"]))
    assert gamma_weights(torch.zeros(2, 5), torch.ones(5)).isfinite().all()


@pytest.mark.parametrize("on_device", [False, True])
def test_training_loss_of_evdvae(on_device: bool) -> None:
    """Weight and balancing at eight steps of the run, also as a captured step reads them."""
    numbers = Numbers("evdvae")
    x = torch.from_numpy(numbers.expected["x_uint8"]).double() / 255
    objective = evdvae_objective(numbers, 800_000)
    losses = []
    for step in numbers.expected["train_step_n"].tolist():
        now = objective.coefficients(step, 800_000)
        tensors = [torch.tensor(value, dtype=torch.float64) for value in now.values()]
        loss = objective(
            numbers.model, x, numbers.noise(), step=step, total_steps=800_000,
            on_device=tensors if on_device else None,
        )  # fmt: skip
        losses.append(float(loss.data.detach()))
    numbers.assert_close(losses, "train_loss_nats_per_dim")


SETTINGS = {"lr": 2e-3, "wd": 0.01, "betas": (0.9, 0.9), "warmup": 2, "ema": 0.9}


class Scaled:
    """Multiplies the network's input, so that one step's gradients are large."""

    scale = 1.0

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] * self.scale, *args[1:])


def five_steps(
    model: HierarchicalVAE, batch: StepInput, scales: list[float], clip: float, skip: float
) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Five steps by the house's parts, the learning rate a step later, as its authors have it.

    Returns:
        Losses, norms, rates and skips; and the moving average of the weights.
    """
    config = OptimizerConfig(
        name="adamw", learning_rate=SETTINGS["lr"], min_learning_rate=SETTINGS["lr"],
        warmup_steps=SETTINGS["warmup"], beta2=0.9, epsilon=1e-8, weight_decay=SETTINGS["wd"],
    )  # fmt: skip
    objective = Objective(
        model,
        ObjectiveConfig(
            kl_anneal_portion=0, kl_balancing=False, spectral_weight=0, per_dimension=True
        ),
    )
    optimizer = build_optimizer(config, model.parameters())
    factor = learning_rate_factor(config, 1000, 1000)
    schedule = LambdaLR(optimizer, lambda step: factor(step - 1))
    guard, average = BadSteps(skip_threshold=skip), MovingAverage(SETTINGS["ema"])
    guard.begin(model)
    trainer: Any = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        global_step=0,
        callbacks=[guard],
        optimizers=[optimizer],
    )
    module = NVAELightning(model, objective.config, config)
    average.setup(trainer, module, "fit")
    average.on_train_start(trainer, module)
    scaled = Scaled()
    handle = model.encoder.register_forward_pre_hook(scaled)
    parameters = list(model.parameters())
    step = WholeStep(
        model, objective, optimizer, guard=guard, clip=lambda: clip_grad_norm_(parameters, clip)
    )
    told: dict[str, list[float]] = {name: [] for name in ("loss", "norm", "rate", "skipped")}
    for number, scaled.scale in enumerate(scales):
        at = StepPosition(number, 1000, number + 1, number)
        told["rate"].append(optimizer.param_groups[0]["lr"])
        loss = step(batch, torch.tensor(step.schedule(at), dtype=torch.float64), at)
        schedule.step()
        trainer.global_step += 1
        average.on_train_batch_end(trainer, module, None, None, number)
        reading = guard.read()
        told["loss"].append(float(loss.data))
        told["norm"].append(reading.norm)
        told["skipped"].append(float(reading.streak > 0))
    handle.remove()
    averaged = average.averaged_state()
    return told, {name: averaged[f"model.{name}"] for name, _ in model.named_parameters()}


def straight_line(
    model: HierarchicalVAE, batch: StepInput, scales: list[float], clip: float, skip: float
) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """The same from the formulas of the paper's training, one after the other."""
    named = dict(model.named_parameters())
    first = {n: torch.zeros_like(p) for n, p in named.items()}
    second = {n: torch.zeros_like(p) for n, p in named.items()}
    average = {n: p.detach().clone() for n, p in named.items()}
    told: dict[str, list[float]] = {name: [] for name in ("loss", "norm", "rate", "skipped")}
    scaled = Scaled()
    handle = model.encoder.register_forward_pre_hook(scaled)
    taken = 0
    for number, scaled.scale in enumerate(scales):
        model.zero_grad()
        output = model(batch.x, batch.noise)
        nll = -model.likelihood(output.logits).log_prob(batch.x)
        loss = ((nll + output.kl_per_group.sum(1)) / batch.x[0].numel()).mean()
        loss.backward()
        with torch.no_grad():
            norm = float(sum(p.grad.square().sum() for p in named.values()) ** 0.5)
            rate = SETTINGS["lr"] * min(number / SETTINGS["warmup"], 1)
            for name, value in zip(told, (float(loss), norm, rate, norm >= skip), strict=True):
                told[name].append(float(value))
            if norm >= skip:
                continue
            taken += 1
            for name, p in named.items():
                g = p.grad * min(1, clip / (norm + 1e-6))
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.9 * second[name] + 0.1 * g * g
                m, v = (t[name] / (1 - 0.9**taken) for t in (first, second))
                p -= rate * (m / (v.sqrt() + 1e-8) + SETTINGS["wd"] * p)
                average[name] = 0.9 * average[name] + 0.1 * p
    handle.remove()
    return told, average


def test_five_steps_of_vdvae() -> None:
    """Unit of the loss, clipping, a step left out, decoupled decay, the average."""
    theirs, ours = Numbers("vdvae"), Numbers("vdvae")
    x = channels_first(ours.expected["image"]) / 255
    batch = StepInput(x, ours.noise(), torch.arange(len(x)))
    scales = [1.0, 1.0, 30.0, 1.0, 1.0]
    probe, _ = straight_line(Numbers("vdvae").model, batch, scales, 1e9, 1e9)
    clip, skip = 0.8 * probe["norm"][0], 0.5 * (probe["norm"][0] + probe["norm"][2])
    expected, expected_average = straight_line(theirs.model, batch, scales, clip, skip)
    assert expected["skipped"] == [0, 0, 1, 0, 0]
    found, average = five_steps(ours.model, batch, scales, clip, skip)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-9, err_msg=name)
    for name, weight in theirs.model.named_parameters():
        torch.testing.assert_close(
            ours.model.get_parameter(name), weight, rtol=1e-8, atol=1e-10, msg=name
        )
        torch.testing.assert_close(
            average[name], expected_average[name], rtol=1e-8, atol=1e-10, msg=name
        )
