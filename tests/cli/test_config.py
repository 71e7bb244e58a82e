"""Every shipped configuration composes; every mistake is one line before any work."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from nvae.cli.config import TrainConfig, register, train_config
from nvae.cli.errors import one_line

ROOT = Path(__file__).parents[2]


def composed(*overrides: str) -> TrainConfig:
    register()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return train_config(compose("train", overrides=list(overrides)))


def _choices(group: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / "configs" / group).glob("*.yaml"))


@pytest.mark.parametrize("group", ["experiment", "optimizer", "debug", "callbacks", "logger"])
def test_every_choice_composes(group: str) -> None:
    for choice in _choices(group):
        if choice.startswith("apex"):  # composes where apex is installed
            with pytest.raises(ValueError, match="apex"):
                composed(f"{group}={choice}")
        else:
            composed(f"{group}={choice}")


def test_all_experiments_are_there() -> None:
    papers = {"mnist", "cifar10", "celeba64", "imagenet32", "celebahq256", "ffhq256"}
    assert set(_choices("experiment")) >= {"digits"} | papers | {f"{p}_1gpu" for p in papers}


def test_objective_of_the_presets() -> None:
    """Table of the paper: lambda, its annealing, warm-up, epochs, learning rate."""
    table = {
        "mnist": (1e-2, None, 5, 400, 1e-2),
        "cifar10": (1e-2, None, 5, 400, 1e-2),
        "celeba64": (1e-1, None, 5, 90, 1e-2),
        "imagenet32": (1e-2, 1.0, 1, 45, 1e-2),
        "celebahq256": (1e-2, 1.0, 5, 300, 1e-2),
        "ffhq256": (1e-1, 1.0, 5, 200, 8e-3),
    }
    for name, expected in table.items():
        for variant in (name, f"{name}_1gpu"):
            c = composed(f"experiment={variant}")
            assert expected == (
                c.objective.spectral_weight, c.objective.spectral_weight_initial,
                c.optimizer.warmup_epochs, c.trainer.max_epochs, c.optimizer.learning_rate,
            ), variant  # fmt: skip
            assert (c.optimizer.name, c.optimizer.epsilon) == ("adamax", 1e-3)
            assert c.optimizer.min_learning_rate == 1e-4
            assert c.model.latent_channels == 20


def test_one_gpu_makes_the_papers_batch_by_accumulation() -> None:
    for name in ("mnist", "cifar10", "celeba64", "imagenet32", "celebahq256", "ffhq256"):
        paper, single = composed(f"experiment={name}"), composed(f"experiment={name}_1gpu")
        assert single.trainer.world_size == 1
        batch = single.data.batch_size * single.trainer.accumulate_grad_batches
        assert batch == paper.data.batch_size * paper.trainer.world_size, name


def test_single_overrides_change_depth_width_and_devices() -> None:
    c = composed("experiment=mnist", "model.groups_per_scale=15", "model.encoder_channels=64")
    assert (c.model.groups_per_scale, c.model.encoder_channels) == (15, 64)
    c = composed("trainer=ddp", "trainer.devices=8", "trainer.num_nodes=3")
    assert c.trainer.world_size == 24


def test_model_follows_the_data() -> None:
    c = composed("data=random", "data.image_size=16", "data.channels=1", "data.bits=5")
    assert (c.model.image_size, c.model.image_channels, c.model.bits) == (16, 1, 5)


MISTAKES = {
    "model.groups_per_scal=3": "unknown key model.groups_per_scal (did you mean groups_per_scale?)",
    "+model.width=3": "unknown key model.width; allowed here: image_size",
    "trainer.max_epochs=many": "trainer.max_epochs=many is not an integer",
    "callbacks.guard.skip_threshold=big": "skip_threshold='big' is not a number or null",
    "compile=perhaps": "compile=perhaps is not true or false",
    "experiment=minst": "experiment=minst is unknown (did you mean mnist?); allowed: ",
    "model.num_scales=5": "cannot be halved",
    "model.cell_family=resnet": "allowed: res_mbconv",
    "data.likelihood=bernoulli": "needs black and white pixels",
    "model.image_size=16": "set data.image_size, the model follows it",
    "resume=sometimes": "allowed: auto, never, must",
    "checkpoint_cells=some": "allowed: true, false, auto",
    "optimizer.name=sgd": "allowed: adamax, adamw",
    "optimizer.min_learning_rate=1": "allowed: 0 to learning_rate=0.01",
    "trainer.precision=8": "allowed: 32, bf16-mixed, 16-mixed",
    "callbacks.guard.on_divergence=cry": "allowed: stop, rollback",
    "callbacks.ema.decay=1": "allowed: 0 up to, not with, 1",
    "callbacks.checkpoint.keep_last=1": "must be at least 2",
    "trainer.log_every_n_steps=0": "must be at least 1",
    "report.temperatures=[-1]": "must be at least 0",
    "name=a/b": "is no folder name",
    "trainer=slurm": "start it with srun",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_mistake_is_one_line(override: str) -> None:
    with pytest.raises((HydraException, OmegaConfBaseException, ValueError)) as caught:
        composed(override)
    line = one_line(caught.value, TrainConfig)
    assert MISTAKES[override] in line
    assert "\n" not in line


def test_command_says_it_in_one_line_and_exits_with_2(tmp_path: Path) -> None:
    """No traceback, and nothing made on disk."""
    job = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "model.num_scales=9", f"runs_dir={tmp_path}/runs"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert job.returncode == 2
    assert len(job.stderr.splitlines()) == 1, job.stderr
    assert job.stderr.startswith("error: model.image_size=8 cannot be halved")
    assert not job.stdout
    assert not list(tmp_path.iterdir())


def test_cfg_job_prints_everything(tmp_path: Path) -> None:
    job = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--cfg", "job", "experiment=ffhq256"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    printed = yaml.safe_load(job.stdout)
    assert printed["model"]["num_flows"] == 2
    assert printed["callbacks"]["guard"]["max_consecutive_skips"] == 50
    assert set(printed) == set(TrainConfig.__dataclass_fields__)
    assert not list(tmp_path.iterdir())
