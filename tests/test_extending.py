"""What a stranger adds from outside the package, in one file each: `examples/own_*.py`.

Nothing here may need a change in `nvae/`; the modules are imported because the user names them,
never because a file does.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nvae.checkpoint import CheckpointError, describe, load_model, save_checkpoint, save_model
from nvae.cli import evaluate, sample
from nvae.cli import train as train_command
from nvae.export import __main__ as export_command
from nvae.models import MODELS, HierarchicalVAE, ModelConfig, plugins_of
from nvae.models.cells import CELL_FAMILIES
from nvae.models.pixel_distribution import LIKELIHOODS
from nvae.objective import OBJECTIVES, Loss, ObjectiveConfig, build_objective
from nvae.settings import Registry
from tests.cli.commands import Commands
from tests.hostile.runs import TINY, train
from tests.models.small import small_config, small_model, small_very_deep

EXAMPLES = Path(__file__).parents[1] / "examples"
LIKELIHOOD, CELLS = "own_likelihood:Laplace", "own_cells:SEPARABLE"
MODEL, OBJECTIVE = "own_model:Ladder", "own_objective:Decorrelated"
REGISTRIES: tuple[Registry[Any], ...] = (MODELS, LIKELIHOODS, CELL_FAMILIES, OBJECTIVES)


@pytest.fixture(autouse=True)
def stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules can be imported, and nobody has named them yet."""
    monkeypatch.syspath_prepend(EXAMPLES)
    for module in ("own_likelihood", "own_cells", "own_model", "own_objective"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    for registry in REGISTRIES:
        ours = {name: known for name, known in registry._known.items() if ":" not in name}
        monkeypatch.setattr(registry, "_known", ours)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new process, in which nobody has named anything."""
    for registry in REGISTRIES:
        ours = {name: known for name, known in registry._known.items() if ":" not in name}
        monkeypatch.setattr(registry, "_known", ours)
    for module in [name for name in sys.modules if name.startswith("own_")]:
        monkeypatch.delitem(sys.modules, module)


def own_model(**settings: Any) -> HierarchicalVAE:
    cls = MODELS[MODEL]
    return cls(cls.config_class.from_dict({"image_size": 8, **settings}))


def train_a_step(model: HierarchicalVAE, **settings: Any) -> Loss:
    """One optimizer step; every weight must take part in it."""
    config = model.config
    x = torch.rand(4, config.image_channels, config.image_size, config.image_size).round()
    objective = build_objective(model.train(), ObjectiveConfig(**settings))
    loss: Loss = objective(model, x, model.draw_noise(4), step=5, total_steps=10)
    assert loss.penalty is not None
    (loss.data + loss.penalty).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    torch.optim.SGD(model.parameters(), 1e-3).step()
    return loss


@pytest.mark.parametrize(
    "settings",
    [{"likelihood": LIKELIHOOD}, {"cell_family": CELLS}],
    ids=["likelihood", "cell family"],
)
def test_a_part_of_ones_own(
    settings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained, sampled, saved; loaded where it is named, refused where only the file names it."""
    model = small_model(**settings)
    train_a_step(model)
    model.eval()
    images = model.sample(2, pixel_temperature=0.5, generator=torch.Generator().manual_seed(0))
    assert images.shape == (2, 1, 16, 16)
    assert images.min() >= 0
    assert images.max() <= 1
    path, (name,) = tmp_path / "model.ckpt", settings.values()
    assert plugins_of(model) == [name]
    save_model(model, path)
    forget(monkeypatch)
    assert_refused(path, name)
    loaded = load_model(path, plugins=[name])
    noise = model.draw_noise(2)
    torch.testing.assert_close(
        loaded.sample_logits(2, noise=noise), model.sample_logits(2, noise=noise)
    )


def test_what_only_looks_like_a_plugin_is_none() -> None:
    model = small_very_deep("vdvae", custom_widths="4:8")
    assert ":" in model.config.to_dict()["custom_widths"]
    assert plugins_of(model) == plugins_of(small_model()) == []


def test_a_model_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built by name, trained, sampled, saved, loaded, and refused where only the file names it."""
    model = own_model(likelihood="logistic_mixture", image_channels=3, num_mixtures=2)
    assert model.groups_per_scale == (1, 1)
    loss = train_a_step(model)
    assert loss.kl_per_group.shape == (2,)
    assert model.eval().without_encoder().sample(2, 0.7).shape == (2, 3, 8, 8)
    path = tmp_path / "model.ckpt"
    save_model(model, path)
    forget(monkeypatch)
    assert_refused(path, MODEL)
    loaded = load_model(path, plugins=[MODEL])
    assert type(loaded).__name__ == "Ladder"
    x, noise = torch.rand(2, 3, 8, 8), model.draw_noise(2)
    torch.testing.assert_close(loaded(x, noise).logits, model(x, noise).logits)


def assert_refused(path: Path, name: str) -> None:
    """One line that says how to allow it; the module stays unimported."""
    with pytest.raises(CheckpointError) as refused:
        load_model(path)
    assert f"plugins=[{name}]" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert name.partition(":")[0] not in sys.modules


def test_a_file_cannot_borrow_what_is_named_for_another_setting(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    model = own_model()
    described = {**describe(model), "model": LIKELIHOOD}
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    save_checkpoint({**described, "state_dict": state}, path)
    with pytest.raises(CheckpointError, match="architecture='own_likelihood:Laplace' is unknown"):
        load_model(path, plugins=[LIKELIHOOD])


def test_a_term_of_ones_own_is_in_the_loss_and_in_the_logs() -> None:
    model = small_model()
    loss = train_a_step(model, name=OBJECTIVE, options={"weight": 2.0}, kl_balancing=False)
    assert loss.terms["decorrelation"] > 0
    parts = sum(loss.terms[name] for name in ("reconstruction", "kl_balanced", "decorrelation"))
    torch.testing.assert_close(loss.data.detach(), parts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": OBJECTIVE, "options": {"wieght": 1.0}},
         f"objective.options.wieght is unknown; objective.name={OBJECTIVE} has: weight"),
        ({"name": OBJECTIVE, "options": {"weight": "much"}},
         "objective.options.weight='much' is not a number"),
        ({"options": {"weight": 1.0}},
         "objective.options.weight is unknown; objective.name=elbo has: none"),
        ({"name": LIKELIHOOD}, f"objective.name={LIKELIHOOD} is no Objective"),
        ({"name": "no_such:Thing"}, "objective.name=no_such:Thing cannot be imported: No module"),
    ],
)  # fmt: skip
def test_wrong_objectives_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="objective") as refused:
        ObjectiveConfig(**settings)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        ("own_objective:Decorrelated", "is no model, likelihood or cell family"),
        ("own_model:Nothing", "cannot be imported"),
        ("pathlib", "cannot be imported"),
        (".own_model:Model", "write package.module:Class, not a path"),
        ("./own_model.py:Model", "write package.module:Class, not a path"),
    ],
)
def test_wrong_plugins_are_one_line(plugin: str, message: str, tmp_path: Path) -> None:
    save_model(small_model(), tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "model.ckpt", plugins=[plugin])


def test_a_configuration_names_both_forms() -> None:
    """What the user composes may import; what a file holds may not."""
    assert small_config(likelihood=LIKELIHOOD).likelihood == LIKELIHOOD
    with pytest.raises(ValueError, match=r"allowed: bernoulli, .*plugins=\[own_cells:SEPARABLE\]"):
        ModelConfig.from_dict({"likelihood": CELLS})
    assert "own_cells" not in sys.modules


@pytest.mark.slow
def test_train_takes_them_from_the_command_line(tmp_path: Path) -> None:
    """Likelihood, cells and objective of one's own in one run of `train.py`."""
    ended = train(
        tmp_path, f"model.likelihood={LIKELIHOOD}", f"model.cell_family={CELLS}",
        f"objective.name={OBJECTIVE}", "+objective.options.weight=0.5", "data.bits=8",
        before=find_examples,
    )  # fmt: skip
    assert ended.code == 0, ended
    readings = (tmp_path / "runs" / "r" / "metrics.jsonl").read_text().splitlines()
    assert any("train/decorrelation" in json.loads(line) for line in readings)


OWN_YAML = """\
# @package _global_
architecture: own_model:Ladder
model:
  image_size: ${data.image_size}
  image_channels: ${data.channels}
  bits: ${data.bits}
  likelihood: ${data.likelihood}
  width: 4
"""


@pytest.mark.slow
def test_a_model_of_ones_own_through_all_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained, sampled and evaluated from the command line; its mistakes are one line."""
    (tmp_path / "configs" / "model").mkdir(parents=True)
    (tmp_path / "configs" / "model" / "ladder.yaml").write_text(OWN_YAML)
    train_main = Commands(train_command.main, monkeypatch, capsys, tmp_path)
    tiny = [word for word in TINY if not word.startswith("model.")]
    words = ["--config-dir=configs", "model=ladder", *tiny]
    for mistake, line in (
        ("model.wdth=3", "unknown key model.wdth (did you mean width?); allowed here: "),
        ("+model.depth=3", "num_mixtures, num_classes, width"),
        ("model.width=many", "model.width='many' is not an integer"),
        ("model.width=0", "model.width is 0; it must be at least 1"),
        ("architecture=own_model:Vae", "architecture=own_model:Vae cannot be imported"),
        (f"architecture={LIKELIHOOD}", f"architecture={LIKELIHOOD} is no HierarchicalVAE"),
    ):
        assert line in train_main.fails(*words, mistake)
    assert not (tmp_path / "runs").exists()
    said = train_main(*words)
    assert "samples.png" in said
    assert said.count(f"plugins=[{MODEL}]") == 2  # in the commands that it gives for the next step
    assert "is finished" in train_main(*words)
    refused = train_main.fails(*TINY)
    assert "of another architecture (architecture: own_model:Ladder -> nvae)" in refused

    checkpoint = "checkpoint=runs/r/checkpoints/best.ckpt"
    for main, setting in (
        (sample.main, "seeds=0-1"), (evaluate.main, "importance_samples=[2]"),
    ):  # fmt: skip
        forget(monkeypatch)
        command = Commands(main, monkeypatch, capsys, tmp_path)
        assert f"plugins=[{MODEL}]" in command.fails(checkpoint)
        assert "written to" in command(checkpoint, f"plugins=[{MODEL}]", setting)

    forget(monkeypatch)
    words = [checkpoint.partition("=")[2], "--to", "exported", "--no-sampler"]
    with pytest.raises(SystemExit, match="2"):
        export_command.main(words)
    assert not (tmp_path / "exported").exists()
    export_command.main([*words, "--plugin", MODEL])
    card = (tmp_path / "exported" / "README.md").read_text()
    assert f'load_model("FOLDER", plugins=[{MODEL!r}])' in card
    assert MODELS.name_of(type(load_model(tmp_path / "exported", plugins=[MODEL]))) == MODEL


def find_examples() -> None:
    sys.path.insert(0, str(EXAMPLES))
