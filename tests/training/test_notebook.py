"""The Lightning module by itself: ordinary loaders, callbacks, loggers, no data module of ours."""

import copy
import pickle
import signal
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
)
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from nvae.checkpoint import load_model
from nvae.models import NVAE, ModelConfig
from nvae.objective import ObjectiveConfig
from nvae.training.checkpointing import Checkpoints, step_checkpoints
from nvae.training.ema import MovingAverage
from nvae.training.guard import BadSteps
from nvae.training.module import NVAELightning
from nvae.training.signals import StopOnSignal
from nvae.training.validation import ValidationSums
from tests.outside import two_groups

CONFIG = ModelConfig(
    image_size=8, bits=4, likelihood="logistic_mixture", num_mixtures=2, num_scales=1,
    groups_per_scale=2, preprocess_blocks=1, preprocess_cells=1, postprocess_cells=1,
    encoder_channels=4, decoder_channels=4, latent_channels=2, encoder_cells_per_group=1,
    decoder_cells_per_group=1,
)  # fmt: skip
IMAGES = torch.randint(256, (20, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(
    torch.uint8
)


def fit(
    folder: Path, data: Any, config: ModelConfig = CONFIG, settings: Any = None, **arguments: Any
) -> NVAELightning:
    torch.manual_seed(0)
    module = NVAELightning(NVAE(config), optimizer=settings)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    given = {"max_steps": 3, "logger": False, "enable_checkpointing": False} | quiet | arguments
    trainer = pl.Trainer(accelerator="cpu", default_root_dir=folder, **given)
    loader = data if isinstance(data, DataLoader) else DataLoader(data, batch_size=5)
    trainer.fit(module, loader, loader)
    return module


def test_tensors_pairs_bytes_and_floats_train_alike(tmp_path: Path) -> None:
    """Labels are left aside; bytes and the floats that they make are the same images."""
    floats = IMAGES / 255
    kinds: list[Any] = [
        TensorDataset(IMAGES, torch.zeros(20)), TensorDataset(floats), list(floats), list(IMAGES),
    ]  # fmt: skip
    trained = [fit(tmp_path, data).model.state_dict() for data in kinds]
    for other in trained[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in trained[0].items())


@pytest.mark.parametrize("bits", [1, 4, 5, 8])
def test_images_end_on_the_grid_of_the_likelihood(bits: int) -> None:
    """The upper bits, as our data module keeps them; what lies on the grid stays where it is."""
    config = ModelConfig.from_dict(CONFIG.to_dict() | {"bits": bits})
    module = NVAELightning(NVAE(config))
    module.trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    levels = 2**bits - 1
    x = module.to_input(IMAGES).x
    assert torch.equal(x, (IMAGES.int() >> (8 - bits)) / torch.tensor(float(levels)))
    assert torch.equal(module.to_input(x).x, x)
    assert module.to_input(IMAGES, 5).index.tolist() == list(range(5, 25))


def test_labels_from_one_on_are_found_before_they_are_dropped(tmp_path: Path) -> None:
    """On a GPU a class that there is none of would train as no class, without a word."""
    config = ModelConfig.from_dict(CONFIG.to_dict() | {"num_classes": 4})
    module = NVAELightning(NVAE(config), ObjectiveConfig(label_dropout=1.0))
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    data = TensorDataset(IMAGES, torch.arange(20) % 4 + 1)
    with pytest.raises(ValueError, match="label 4 is none of the model's classes, 0 to 3"):
        trainer.fit(module, DataLoader(data, batch_size=20))


def test_numbers_of_a_density_stay_as_they_are() -> None:
    """They are no levels: rounded to 256 of them, a measurement would lose its last digits."""
    config = ModelConfig.from_dict(CONFIG.to_dict() | {"likelihood": "normal", "bits": 8})
    module = NVAELightning(NVAE(config))
    module.trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(module.to_input(x).x, x)
    assert torch.equal(module.to_input(IMAGES).x, IMAGES / torch.tensor(255.0))


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_deep_images_end_on_the_grid_too(bits: int) -> None:
    """Levels as integers or as fractions, every one of 16 bits through float32 and back."""
    changes = {"bits": bits, "image_size": [256, 256], "image_channels": 1}
    config = ModelConfig.from_dict(CONFIG.to_dict() | changes)
    module = NVAELightning(NVAE(config))
    module.trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    levels = torch.arange(2**16).remainder(2**bits).view(1, 1, 256, 256)
    x = module.to_input(levels.to(torch.uint16)).x
    assert torch.equal(x, levels / torch.tensor(2.0**bits - 1))
    assert torch.equal(module.to_input(x).x, x)
    assert torch.equal((x * (2**bits - 1)).round().long(), levels)
    with pytest.raises(ValueError, match=r"images are torch.uint8; expected are uint16"):
        module.to_input(levels.to(torch.uint8))


def test_a_rectangular_window_gets_its_border() -> None:
    changes = {"image_size": [16, 12], "counted_size": [8, 10]}
    module = NVAELightning(NVAE(ModelConfig.from_dict(CONFIG.to_dict() | changes)))
    module.trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    x = module.to_input(torch.full((2, 1, 8, 10), 255, dtype=torch.uint8)).x
    assert x.shape == (2, 1, 16, 12)
    assert (x[..., 4:12, 1:11] == 1).all()
    assert x.sum() == 2 * 80


def test_a_counted_window_gets_its_border() -> None:
    config = ModelConfig.from_dict(CONFIG.to_dict() | {"image_size": 16, "counted_size": 8})
    module = NVAELightning(NVAE(config))
    module.trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    x = module.to_input(IMAGES).x
    assert x.shape == (20, 1, 16, 16)
    assert not x[..., :4].any()
    assert torch.equal(x[..., 4:12, 4:12], (IMAGES.int() >> 4) / torch.tensor(15.0))


MISTAKES: dict[str, tuple[Any, str]] = {
    "not in [0, 1]": (IMAGES.float(), "images lie between 0 and"),
    "another shape": (IMAGES[..., :4], "images have shape"),
    "no images": (torch.zeros(20, 3), r"a batch holds \(5, 3\); expected are images"),
    "integers": (IMAGES.long(), "images are torch.int64; expected are uint8"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_bad_batch_is_named(tmp_path: Path, mistake: str) -> None:
    images, told = MISTAKES[mistake]
    with pytest.raises(ValueError, match=told):
        fit(tmp_path, list(images))


def test_black_and_white_needs_a_model_of_one_bit(tmp_path: Path) -> None:
    config = ModelConfig.from_dict(CONFIG.to_dict() | {"likelihood": "bernoulli"})
    with pytest.raises(ValueError, match="likelihood=bernoulli needs black and white pixels"):
        fit(tmp_path, list(IMAGES), config)


def test_a_run_without_an_end_is_named(tmp_path: Path) -> None:
    class Endless(IterableDataset[Tensor]):
        def __iter__(self) -> Any:
            while True:
                yield IMAGES[0]

    assert fit(tmp_path, Endless(), limit_val_batches=1).trainer.global_step == 3
    for end in ({"max_steps": -1, "max_time": "00:00:01:00"}, {"max_steps": -1, "max_epochs": 2}):
        data = Endless() if "max_epochs" in end else list(IMAGES)
        with pytest.raises(ValueError, match=r"not known: give the Trainer max_steps"):
            fit(tmp_path, data, limit_val_batches=1, **end)


def test_lightnings_callbacks_and_loggers(tmp_path: Path) -> None:
    """They monitor what is logged; the best checkpoint loads, tests and predicts."""
    best = ModelCheckpoint(tmp_path, monitor="valid/negative_elbo")
    callbacks = [best, EarlyStopping("train/loss", check_on_train_epoch_end=True, min_delta=1e9,
                                     patience=2), LearningRateMonitor()]  # fmt: skip
    module = fit(
        tmp_path, list(IMAGES), max_steps=-1, max_epochs=9, callbacks=callbacks,
        enable_checkpointing=True, logger=CSVLogger(tmp_path), log_every_n_steps=2,
    )  # fmt: skip
    trainer = module.trainer
    assert trainer.current_epoch == 3  # stopped early
    logged = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
    assert {"train/loss", "valid/negative_elbo", "lr-Adamax"} <= set(
        logged.split("\n")[0].split(",")
    )
    loaded = load_model(best.best_model_path)
    again = NVAELightning.load_from_checkpoint(best.best_model_path, model=NVAE(CONFIG))
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])
    assert again.hparams["model_config"] == CONFIG.to_dict()
    loader = DataLoader(list(IMAGES), batch_size=7)  # type: ignore[arg-type]
    (tested,) = trainer.test(module, loader, ckpt_path=best.best_model_path, verbose=False)
    assert best.best_model_score is not None
    # every image's noise is its own, whatever the batches
    assert tested["test/negative_elbo"] == pytest.approx(float(best.best_model_score), rel=1e-5)
    predicted = trainer.predict(module, loader)
    assert predicted is not None
    assert torch.cat(predicted).shape == IMAGES.shape  # type: ignore[arg-type]


def test_a_stopped_run_goes_on_from_lightnings_checkpoint(tmp_path: Path) -> None:
    """Optimizer, schedule and noise: as if it had not been stopped."""
    data = list(IMAGES)
    whole = fit(tmp_path, data, max_steps=8)

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "x.ckpt")

    fit(tmp_path, data, max_steps=8, callbacks=[Stop()])
    torch.manual_seed(1)
    module = NVAELightning(NVAE(CONFIG))
    trainer = pl.Trainer(
        max_steps=8, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=5), ckpt_path=tmp_path / "x.ckpt")  # type: ignore[arg-type]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, module.model.state_dict()[name]), name


def test_callbacks_and_module_serve_a_second_fit(tmp_path: Path) -> None:
    """Nothing of the first one is left: it trains, keeps its average, and ends with it."""
    average, guard, signals = MovingAverage(0.5), BadSteps(), StopOnSignal()
    first = fit(tmp_path / "a", list(IMAGES), callbacks=[average, guard, signals])
    signals._note(signal.SIGUSR1, None)  # too late for the first
    again = fit(tmp_path / "b", list(IMAGES), callbacks=[average, guard, signals])
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    assert guard.state_dict() == {"accepted": 3}
    copied = copy.deepcopy(again)
    trainer = pl.Trainer(
        max_steps=2, accelerator="cpu", callbacks=[MovingAverage(0.5)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(again, DataLoader(list(IMAGES), batch_size=5))  # type: ignore[arg-type]
    pairs = zip(again.parameters(), copied.parameters(), strict=True)
    assert not any(torch.equal(ours, theirs) for ours, theirs in pairs)
    pickle.loads(pickle.dumps(copied))


def test_evaluation_after_a_fit_takes_the_model_that_it_is_given(tmp_path: Path) -> None:
    """Not the average that the Trainer's callback still holds, nor raw weights of a file."""
    saved = ModelCheckpoint(tmp_path, save_last=True)
    module = fit(
        tmp_path, list(IMAGES), callbacks=[MovingAverage(0.5), saved], enable_checkpointing=True
    )
    trainer, loader = module.trainer, DataLoader(list(IMAGES), batch_size=5)  # type: ignore[arg-type]
    alone = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    (wanted,) = alone.test(module, loader, verbose=False)
    (found,) = trainer.test(module, loader, ckpt_path=saved.last_model_path, verbose=False)
    assert found == wanted
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.1)
    (found,) = trainer.validate(module, loader, verbose=False)
    (wanted,) = alone.validate(module, loader, verbose=False)
    assert found == wanted


def test_a_schedule_of_accumulation_is_refused(tmp_path: Path) -> None:
    scheduler = GradientAccumulationScheduler({0: 1, 1: 2})
    with pytest.raises(ValueError, match="give accumulate_grad_batches instead"):
        fit(tmp_path, list(IMAGES), callbacks=[scheduler])


def test_an_average_in_the_trainers_precision(tmp_path: Path) -> None:
    """The Trainer converts the module after the average was made."""
    module = fit(tmp_path, list(IMAGES), callbacks=[MovingAverage(0.5)], precision="64-true")
    assert {p.dtype for p in module.parameters()} == {torch.float64}


def test_a_run_in_the_folder_of_an_earlier_one_has_its_own_checkpoints(tmp_path: Path) -> None:
    """Those of later steps, which nothing of this run leads to, neither push its own out nor stay.

    And a callback that served another run takes this one's best for the best.
    """
    ours = Checkpoints(every_steps=1, keep_last=2)
    folders = [tmp_path / "first", tmp_path / "second"]
    (tmp_path / "second/checkpoints").mkdir(parents=True)
    for step in (10, 12):
        (tmp_path / f"second/checkpoints/step_{step:08d}.ckpt").write_bytes(b"of another run")
    for folder in folders:  # alike, so that neither's best is better
        module = fit(folder, list(IMAGES), callbacks=[ours], val_check_interval=2)
        names = [path.name for path in step_checkpoints(folder / "checkpoints")]
        assert names == ["step_00000002.ckpt", "step_00000003.ckpt"]
        assert (folder / "checkpoints/best.ckpt").exists()
    best = ours.best
    ours.setup(module.trainer, module, "fit")  # to go on with the same Trainer
    assert ours.best == best is not None


def test_lightning_reads_the_best_of_a_validation_without_a_checkpoint(tmp_path: Path) -> None:
    """It holds weights alone: they are tested and loaded; nothing is trained on from them."""
    ours = Checkpoints(every_epochs=9)
    module = fit(tmp_path, list(IMAGES), callbacks=[ours], val_check_interval=2)
    best = tmp_path / "checkpoints/best.ckpt"
    again = NVAELightning.load_from_checkpoint(best, model=NVAE(CONFIG))
    loaded = load_model(best)
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    loader = DataLoader(list(IMAGES), batch_size=5)  # type: ignore[arg-type]
    (tested,) = module.trainer.test(module, loader, ckpt_path=best, verbose=False)
    assert tested["test/negative_elbo"] == pytest.approx(ours.best, rel=1e-5)
    with pytest.raises(KeyError, match="checkpoint contains only the model"):
        module.trainer.fit(module, loader, ckpt_path=best)


class TwoRates(NVAELightning):
    """Vectors learn at a rate of their own."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        vectors, rest = [], []
        for parameter in self.model.parameters():
            (vectors if parameter.ndim == 1 else rest).append(parameter)
        return torch.optim.SGD(
            [{"params": rest}, {"params": vectors, "lr": 1e-5}], lr=1e-4, momentum=0.9
        )


class SomeLearn(NVAELightning):
    """The first parameter does not."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(list(self.model.parameters())[1:], lr=1e-4, momentum=0.9)


@pytest.mark.parametrize("kind", [TwoRates, SomeLearn])
def test_a_subclass_with_another_optimizer_reads_its_checkpoints(
    tmp_path: Path, kind: type[NVAELightning]
) -> None:
    """Which parameters it has, in how many groups, is for torch to compare."""
    loader = DataLoader(list(IMAGES), batch_size=5)  # type: ignore[arg-type]
    given: dict[str, Any] = {
        "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False,
    }  # fmt: skip
    trainer = pl.Trainer(max_steps=1, **given)
    trainer.fit(kind(NVAE(CONFIG)), loader)
    path = tmp_path / "x.ckpt"
    trainer.save_checkpoint(path)
    pl.Trainer(**given).test(kind(NVAE(CONFIG)), loader, ckpt_path=path, verbose=False)
    again = pl.Trainer(max_steps=2, **given)
    again.fit(kind(NVAE(CONFIG)), loader, ckpt_path=path)
    assert again.global_step == 2
    with pytest.raises(ValueError, match=r"parameter groups|of 104 parameters"):
        pl.Trainer(max_steps=2, **given).fit(NVAELightning(NVAE(CONFIG)), loader, ckpt_path=path)


SCHEDULES: dict[str, dict[str, Any]] = {
    "by steps": {"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 1, "gamma": 0.5,
                 "interval": "step"},
    "of the whole run": {"_target_": "torch.optim.lr_scheduler.OneCycleLR", "max_lr": 0.1,
                         "interval": "step"},
    "by a metric": {"_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau",
                    "monitor": "valid/negative_elbo"},
}  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_any_optimizer_and_schedule(tmp_path: Path, schedule: str) -> None:
    settings = {
        "name": "torch.optim:SGD", "learning_rate": 1e-4, "min_learning_rate": 0,
        "arguments": {"momentum": 0.9}, "schedule": SCHEDULES[schedule],
    }  # fmt: skip
    module = fit(tmp_path, list(IMAGES), settings=settings)
    group = module.trainer.optimizers[0].param_groups[0]
    assert group["momentum"] == pytest.approx(0.9, abs=0.06)
    if schedule == "by steps":
        assert group["lr"] == pytest.approx(1e-4 / 8)
    if schedule == "of the whole run":  # which chooses the rate that it begins with
        assert group["max_lr"] == pytest.approx(0.1)
        assert group["initial_lr"] == pytest.approx(0.1 / 25)


def test_groups_of_different_widths_are_validated(tmp_path: Path) -> None:
    """A model that is none of ours trains; its groups' KLs add up to the whole."""
    model = two_groups()
    x = (IMAGES > 127).float()
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    loader = DataLoader(list(x), batch_size=10)  # type: ignore[arg-type]
    trainer.fit(NVAELightning(model), loader, loader)
    sums = ValidationSums(model)
    with model.evaluating(), torch.no_grad():
        output = model(x, sums.noise(model, torch.arange(20)))
        sums.add(output, model.likelihood(output.logits).log_prob(x))
    means = sums.means(trainer.strategy)
    groups = [means[f"valid_kl_group/{group:02d}"] for group in (0, 1)]
    assert groups == pytest.approx(output.kl_per_group.mean(0).tolist(), rel=1e-5)
    assert sum(groups) == pytest.approx(float(trainer.callback_metrics["valid/kl"]), rel=1e-5)
