"""What a run says of its speed: time without data, memory, arithmetic."""

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.flop_counter import FlopCounterMode

from nvae.models import NVAE, ModelConfig
from nvae.models.normalization import BatchNorm
from nvae.training import throughput
from nvae.training.module import NVAELightning
from nvae.training.progress import describe_metrics
from nvae.training.recompute import recompute_segments
from nvae.training.throughput import Throughput, flops_per_image, peak_tflops
from tests.models.small import small_model
from tests.training.runs import run, small_config


class Clock:
    """A clock that goes when it is told to."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(throughput, "time", made)
    return made


@pytest.fixture
def model() -> NVAE:
    """Whose first batch is behind it."""
    torch.manual_seed(0)
    made = NVAE(
        ModelConfig(
            image_size=8, bits=4, likelihood="logistic_mixture", num_mixtures=2, num_scales=2,
            groups_per_scale=2, encoder_channels=4, decoder_channels=4, latent_channels=2,
            preprocess_blocks=1, preprocess_cells=1, postprocess_cells=1,
        )
    ).train()  # fmt: skip
    made(torch.rand(2, 1, 8, 8))
    return made


def test_time_is_shared_out(clock: Clock, model: NVAE) -> None:
    """Ten seconds of which four without data; five of validation do not count."""
    speed = Throughput()
    for waited in (1.0, 3.0):
        speed.wait()
        clock.now += waited
        speed.resume()
        clock.now += 3
        speed.images += 8
    speed.wait()
    speed.pause()
    clock.now += 5
    speed.go_on()
    speed.resume()
    metrics = speed.read(model, "32-true", 2)
    assert metrics["train/images_per_second"] == pytest.approx(1.6)
    assert metrics["train/data_wait"] == pytest.approx(0.4)
    assert metrics["train/tflops"] == pytest.approx(1.6 * flops_per_image(model) / 2 / 1e12)
    assert "train/mfu" not in metrics
    clock.now += 2  # the next reading begins anew
    assert speed.read(model, "32-true", 2)["train/data_wait"] == 0


def test_operations_are_three_forward_passes(model: NVAE) -> None:
    """Those of the model: not more where activations are recomputed; nothing else is touched."""
    with FlopCounterMode(display=False) as counter:
        model(torch.rand(2, 1, 8, 8))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    group: Any = object()
    norm = next(m for m in model.modules() if isinstance(m, BatchNorm))
    norm.group = group  # a reduction of tensors without storage would fail
    generator = torch.get_rng_state()
    expected = 3 * counter.get_total_flops() / 2
    assert flops_per_image(model) == expected > 1e5
    recompute_segments(model)
    assert flops_per_image(model) == expected
    assert norm.group is group
    assert torch.equal(torch.get_rng_state(), generator)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_operations_of_a_rectangle_go_by_its_area() -> None:
    """Half a square without dense layers takes half of its operations."""
    square, half = (
        small_model(image_size=size, squeeze_excitation=False) for size in (16, (8, 16))
    )
    assert flops_per_image(half) == flops_per_image(square) / 2


def test_a_model_that_looks_at_values_has_no_count(
    model: NVAE, caplog: pytest.LogCaptureFixture
) -> None:
    """The run goes on without; one line says so, once."""

    def look(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        assert float(arguments[0].sum()) < 1e9

    model.image_head.register_forward_pre_hook(look)
    speed = Throughput()
    with caplog.at_level(logging.WARNING):
        assert "train/tflops" not in speed.read(model, "32-true", 1)
        assert "train/tflops" not in speed.read(model, "32-true", 1)
    assert caplog.text.count("train/tflops is left out: ") == 1


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", True, 989),
        ("NVIDIA H100 PCIe", "16-mixed", True, 756),
        ("NVIDIA A100-SXM4-80GB", "32-true", True, 156),
        ("NVIDIA A100-SXM4-80GB", "32-true", False, 19.5),
        ("NVIDIA L40S", "bf16-mixed", True, 362),
        ("NVIDIA L4", "bf16-mixed", True, 121),
        ("NVIDIA Unheard-of", "bf16-mixed", True, None),
    ],
)
def test_the_peak_is_that_of_the_type_in_use(
    name: str, precision: str, tf32: bool, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    conv = SimpleNamespace(fp32_precision="tf32" if tf32 else "ieee")
    monkeypatch.setattr(torch.backends, "cudnn", SimpleNamespace(conv=conv))
    assert peak_tflops(torch.device("cuda", 0), precision) == peak


def test_utilization_is_a_share_of_the_peak(
    clock: Clock, model: NVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "peak_tflops", lambda *_: 100.0)
    speed = Throughput()
    speed.images, clock.now = 1000, clock.now + 1
    metrics = speed.read(model, "bf16-mixed", 4)
    assert metrics["train/mfu"] == pytest.approx(metrics["train/tflops"] / 100)


class Slow(IterableDataset[Tensor]):
    """Gives no batch before the clock has gone on."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(6):
            self.clock.now += 2.0
            yield torch.rand(2, 1, 8, 8)


class Work(pl.Callback):
    """A second for every step; keeps what the module reads."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.readings = clock, []

    def on_before_zero_grad(self, *_: Any) -> None:
        self.clock.now += 1.0

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.readings.append(module.latest["train/data_wait"])


def test_a_slow_loader_is_seen(clock: Clock, model: NVAE) -> None:
    """Two seconds for a batch, one for its step."""
    work = Work(clock)
    pl.Trainer(
        max_steps=5, max_epochs=1, accelerator="cpu", log_every_n_steps=1, callbacks=[work],
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
    ).fit(NVAELightning(model), DataLoader(Slow(clock), batch_size=None))  # fmt: skip
    assert len(work.readings) == 5
    assert work.readings[1:] == [pytest.approx(2 / 3)] * 4


def test_a_run_logs_them(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    config.trainer.max_epochs = 1
    begin = time.perf_counter()
    folder, _ = run(config)
    seconds = time.perf_counter() - begin
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    readings = [line for line in lines if "train/images_per_second" in line]
    assert len(readings) == 8
    for line in readings:
        assert line["train/images_per_second"] > 8 / seconds
        assert 0 <= line["train/data_wait"] <= 1
        assert line["train/tflops"] > 0
        assert line["train/peak_memory_gib"] > 0


def test_the_bar_says_where_data_is_slow() -> None:
    metrics = {
        "train/negative_elbo": 3.0, "train/reconstruction": 2.0, "train/kl": 1.0,
        "train/beta": 1.0, "train/images_per_second": 12.0, "train/data_wait": 0.31,
    }  # fmt: skip
    assert describe_metrics(metrics).endswith("12 images/s  31% waiting for data")
    metrics["train/data_wait"] = 0.01
    assert describe_metrics(metrics).endswith("12 images/s")


def test_peak_memory_is_that_of_the_process() -> None:
    """In GiB: it has risen by what is taken above the peak so far."""
    before = throughput.peak_memory(torch.device("cpu"))
    taken = torch.ones(int((before + 0.2) * 2**30 / 4))
    rise = throughput.peak_memory(torch.device("cpu")) - before
    assert 0.1 < rise < before + 1
    assert taken.numel()
