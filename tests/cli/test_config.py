"""Every shipped configuration composes; every mistake is one line before any work."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nvae.cli.config import TrainConfig, register, train_config
from nvae.cli.errors import one_line
from nvae.cli.evaluate_config import EvaluateConfig
from nvae.cli.sample_config import SampleConfig
from nvae.cli.schema import schema_of
from nvae.models import NVAE, ModelConfig

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


@pytest.mark.parametrize("name", _choices("data"))
def test_every_data_set_has_a_network_and_a_schedule(name: str) -> None:
    """Alone, and not those of the digits."""
    c = composed(f"data={name}")
    assert c.name == name
    with torch.device("meta"):
        NVAE(c.model)
    if name != "digits":
        assert c.trainer.cpu_threads is None
        assert (c.model.encoder_channels, c.trainer.max_epochs) != (20, 60)


@pytest.mark.parametrize("name", [n for n in _choices("model") if n.startswith("nvae")])
def test_sizes_say_how_many_parameters_they_have(name: str) -> None:
    text = (ROOT / "configs" / "model" / f"{name}.yaml").read_text()
    said = re.match(r"# ([\d,]+) parameters", text)
    if name == "nvae":
        assert set(yaml.safe_load(text)) - {"defaults"} == set(ModelConfig.__dataclass_fields__)
        return
    sets = {"tiny": ["data=random"], "digits": [], "small": ["experiment=fashion_mnist"],
            "medium": ["data=folder"]}  # fmt: skip
    size = name.removeprefix("nvae_")
    with torch.device("meta"):
        model = NVAE(composed(f"model={name}", *sets.get(size, [f"data={size}"])).model)
    assert said is not None
    assert int(said[1].replace(",", "")) == sum(p.numel() for p in model.parameters())


def test_files_with_every_setting_say_the_defaults() -> None:
    """`configs/model/nvae.yaml` and its like repeat the schema for its readers."""
    plain = OmegaConf.to_container(OmegaConf.structured(schema_of(TrainConfig)))
    assert isinstance(plain, dict)
    of_data = {"image_size", "image_channels", "counted_size", "bits", "likelihood"}
    plain["model"] = OmegaConf.to_container(OmegaConf.structured(schema_of(ModelConfig)))
    for group, skipped in (("model", {"defaults", *of_data}), ("objective", set())):
        values = yaml.safe_load((ROOT / "configs" / group / "nvae.yaml").read_text())
        values = {key: float(v) if str(v).count("e-") else v for key, v in values.items()}
        assert {k: v for k, v in values.items() if k not in skipped} == {
            k: v for k, v in plain[group].items() if k not in skipped
        }
    top = yaml.safe_load((ROOT / "configs" / "train.yaml").read_text())
    groups = {"data", "model", "objective", "optimizer", "trainer", "callbacks", "logger"}
    assert set(top) - {"defaults", "hydra"} == set(plain) - groups
    for key in set(plain) - groups - {"name"}:
        assert top[key] == plain[key], key


@pytest.mark.parametrize("config", [SampleConfig, EvaluateConfig])
def test_files_of_the_other_commands_say_the_defaults(config: type) -> None:
    plain = OmegaConf.to_container(OmegaConf.structured(schema_of(config)))
    name = config.__name__.removesuffix("Config").lower()
    values = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    assert {k: v for k, v in values.items() if k not in ("defaults", "hydra")} == plain


def test_own_data_set_and_class_from_a_folder_of_configurations(tmp_path: Path) -> None:
    """Nothing in the package is touched, and the class comes from where the command is typed."""
    (tmp_path / "configs" / "data").mkdir(parents=True)
    shipped = (ROOT / "configs" / "data" / "random.yaml").read_text()
    own = shipped.replace("name: random", "name: cats")
    (tmp_path / "configs" / "data" / "cats.yaml").write_text(own)
    (tmp_path / "mine.py").write_text(
        "from nvae.models.logistic_mixture import LogisticMixture\n"
        "class Mine(LogisticMixture):\n    pass\n"
    )

    def told(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "train.py"), "--config-dir", "configs", "data=cats"]
        return subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True)

    alone = told()
    assert alone.returncode == 2
    assert alone.stderr.startswith("error: data=cats says nothing of a network")
    job = told(
        "recipe=random", "model.likelihood=mine:Mine", "trainer.max_epochs=1",
        "report.importance_samples=0", "report.samples=2", "data.train_size=32",
        "data.valid_size=2", "data.test_size=2", "callbacks.pictures=null",
    )  # fmt: skip
    assert job.returncode == 0, job.stderr
    assert (tmp_path / "runs" / "cats" / "samples.png").is_file()


def test_all_experiments_are_there() -> None:
    papers = {"mnist", "cifar10", "celeba64", "imagenet32", "celebahq256", "ffhq256"}
    assert set(_choices("experiment")) >= {"digits"} | papers


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
        c = composed(f"experiment={name}")
        assert expected == (
            c.objective.spectral_weight, c.objective.spectral_weight_initial,
            c.optimizer.warmup_epochs, c.trainer.max_epochs, c.optimizer.learning_rate,
        ), name  # fmt: skip
        assert (c.optimizer.name, c.optimizer.epsilon) == ("adamax", 1e-3)
        assert c.optimizer.min_learning_rate == 1e-4
        assert c.model.latent_channels == 20


def test_accumulation_follows_from_the_images_of_a_step() -> None:
    """What the user gives may agree; a null leaves it to the user, as ever."""
    batch = ("data.global_batch=100", "data.batch_size=16")
    assert composed(*batch).trainer.accumulate_grad_batches == 7
    c = composed(*batch, "trainer.devices=2", "trainer.accumulate_grad_batches=4")
    assert c.trainer.accumulate_grad_batches == 4
    again = dataclasses.replace(c, name="again")
    assert again.trainer.accumulate_grad_batches == 4
    assert composed("trainer.accumulate_grad_batches=3").trainer.accumulate_grad_batches == 3


def test_single_overrides_change_depth_width_and_devices() -> None:
    c = composed("experiment=mnist", "model.groups_per_scale=15", "model.encoder_channels=64")
    assert (c.model.groups_per_scale, c.model.encoder_channels) == (15, 64)
    c = composed("trainer=ddp", "trainer.devices=8")
    assert c.trainer.world_size == 8


def test_model_follows_the_data() -> None:
    c = composed("data=random", "data.image_size=16", "data.channels=1", "data.bits=5")
    assert (c.model.image_size, c.model.image_channels, c.model.bits) == (16, 1, 5)


MISTAKES = {
    "model.groups_per_scal=3": "unknown key model.groups_per_scal (did you mean groups_per_scale?)",
    "model.kernels=reference": "unknown key model.kernels: kernels is in no group; give kernels=",
    "kernels=fast": "kernels='fast' is unknown; allowed: auto, reference, cuda",
    "+model.width=3": "unknown key model.width; allowed here: image_size",
    "trainer.max_epochs=many": "trainer.max_epochs=many is not an integer",
    "callbacks.guard.skip_threshold=big": "skip_threshold='big' is not a number or null",
    "compile=perhaps": "compile=perhaps is not true or false",
    "experiment=minst": "experiment=minst is unknown (did you mean mnist?); allowed: ",
    "model.num_scales=5": "cannot be halved",
    "model.cell_family=resnet": "allowed: res_mbconv",
    "data.likelihood=bernoulli": "needs black and white pixels",
    "objective.name=gamma_balanced": "takes objective.kl_balancing=false",
    "model.image_size=16": "take a network for such images (model=...), or data.image_size=16",
    "architecture=vae": "architecture='vae' is unknown; allowed: nvae",
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
    "name=a,b": "name=a,b has commas: write 'name=\"a,b\"', for a list 'name=[a,b]'; -m makes",
    "name=epoch=3 a": "name=epoch=3 a has signs that Hydra takes for its own: write "
    "'name=\"epoch=3 a\"'",
    "name=ü": "write 'name=\"ü\"'",
    "name": "name is no setting: write SETTING=VALUE",
    "a b=1": "a b=1 is no setting",
    "report.temperatures=[1": "report.temperatures=[1 cannot be read: what opens must close",
    "trainer=slurm": "start it with srun",
    "trainer.devices=all": "trainer.devices='all' is unknown; allowed: auto",
    "trainer.num_nodes=3": "was started alone: start it with torchrun --nnodes 3 or srun",
    "data.global_batch=0": "data.global_batch is 0; it must be at least 1",
}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer.accumulate_grad_batches=2"], "=2, but with data.global_batch=100 it follows"),
        (["trainer.devices=80", "data.batch_size=1"], "leaves some of 80 devices without an image"),
        (["trainer.devices=128"], "leaves some of 128 devices without an image"),
    ],
)
def test_a_step_that_cannot_be_shared_is_one_line(overrides: list[str], words: str) -> None:
    overrides = ["data.global_batch=100", "data.batch_size=16", *overrides]
    with pytest.raises(ValueError, match=words) as caught:
        composed(*overrides)
    assert "\n" not in str(caught.value)


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
