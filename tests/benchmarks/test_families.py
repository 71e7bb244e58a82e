"""The comparison of the families: equal sizes, steps by a budget, a command that goes on."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser

from benchmarks import families
from benchmarks.families import FAMILIES, KINDS, Comparison, main, options_of
from nvae.cli.config import compose_train
from tests.test_borders import ROOT


@pytest.mark.parametrize("family", FAMILIES)
def test_networks_have_the_size_that_their_files_say(family: str) -> None:
    text = (ROOT / "configs" / "model" / f"{family}_fashion_mnist.yaml").read_text()
    said = re.search(
        r"# ([\d,]+) parameters in 8-bit gray, ([\d,]+) in black and white, (\d+) latent", text
    )
    assert said is not None
    gray, binarized = (int(number.replace(",", "")) for number in said.groups()[:2])
    for kind, parameters in (("gray", gray), ("binarized", binarized)):
        config = compose_train([f"experiment={family}_{KINDS[kind]}"])
        with torch.device("meta"):
            model = config.build_model()
        assert config.architecture == family
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert model.num_groups == int(said[3])
        assert 2_000_000 < parameters < 2_200_000


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_likelihood_counts_the_28x28_pixels_of_the_images(family: str, kind: str) -> None:
    """Otherwise the families' nats would be of different things."""
    config = compose_train([f"experiment={family}_{KINDS[kind]}"])
    torch.manual_seed(0)
    model = config.build_model()
    x = torch.zeros(1, 1, 32, 32)
    with model.evaluating():
        likelihood = model.likelihood(model(x, model.draw_noise(1)).logits)
    border, inside = x.clone(), x.clone()
    border[..., :2, :] = 1
    inside[..., 2, 2] = 1
    assert torch.equal(likelihood.log_prob(border), likelihood.log_prob(x))
    assert not torch.equal(likelihood.log_prob(inside), likelihood.log_prob(x))


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("train", "parts: pace, tune, runs, table"),
        ("minutes=long", "is no value of minutes"),
        ("minutes=0", "must be above 0"),
        ("minute=3", "settings: minutes="),
    ],
)
def test_a_word_that_means_nothing_is_one_line(
    word: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        options_of([word])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said in error
    assert error.count("\n") == 1


def measured(folder: Path) -> Path:
    """A file of results as the parts leave it."""

    def estimate(mean: float) -> dict[str, float]:
        return {"mean": mean, "standard_error": 0.5}

    result: dict[str, Any] = {
        "negative_elbo": estimate(240.0), "reconstruction": estimate(215.0), "kl": estimate(25.0),
        "negative_elbo_bits_per_dim": estimate(0.4416),
    }  # fmt: skip
    bound = {**result, "importance_weighted": [{"samples": 10, "nll": estimate(238.5)}]}
    run = {"steps": 500, "test": result, "bound": bound, "run": "vdvae_binarized_500"}
    pace = {"parameters": 2_109_809, "fastest": 1.2, "median": 1.3}
    path = folder / "families.json"
    path.write_text(
        json.dumps({"pace": {"vdvae_binarized": pace}, "runs": {"vdvae_binarized": run}})
    )
    return path


def test_steps_fill_the_budget(tmp_path: Path) -> None:
    comparison = Comparison(options_of([f"out={measured(tmp_path)}"]))
    assert comparison.steps("vdvae_binarized", 10) == 500
    with pytest.raises(SystemExit):
        comparison.steps("nvae_binarized", 10)


def test_the_table_holds_what_was_measured_and_no_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["table", f"out={measured(tmp_path)}", f"folder={tmp_path}"]) == 0
    lines = capsys.readouterr().out.split("\n")
    row = (
        "| VDVAE, binarized | 2,109,809 | 500 | 1.20 | 240.00 ± 0.50 | 215.00 + 25.00 | 0.4416 "
        "| 238.50 ± 0.50, K = 10 |"
    )
    assert row in lines
    assert not any("Efficient" in line or "gray" in line for line in lines)


def test_results_that_cannot_be_read_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["table", f"out={tmp_path}"])
    assert capsys.readouterr().err == f"error: {tmp_path} is no regular file\n"


def test_folders_of_any_name_reach_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hydra reads the words, and takes = and [ for its own."""
    folder = tmp_path / "a=b [1]"
    checkpoint = folder / "run" / "checkpoints" / "step.ckpt"
    said: dict[str, list[str]] = {}

    def called(_: Comparison, program: str, words: list[str], *_more: object) -> None:
        said[program] = words

    monkeypatch.setattr(Comparison, "_call", called)
    monkeypatch.setattr(families, "newest_checkpoint", lambda _: SimpleNamespace(path=checkpoint))
    monkeypatch.setattr(families, "read_json", lambda _: {"result": {}} if len(said) > 1 else [1.0])
    comparison = Comparison(options_of([f"folder={folder}", f"data_root={folder}"]))
    comparison._train("run", [], 20)
    comparison._evaluate("run", "test", None, [])
    comparison._sample("run")
    read = OverridesParser.create().parse_overrides(
        [word for each in said.values() for word in each]
    )
    values = {each.key_or_group: str(getattr(v := each.value(), "text", v)) for each in read}
    assert values["runs_dir"] == values["data.root"] == str(folder)
    assert values["checkpoint"] == str(checkpoint)
    assert values["output"] == str(folder / "run" / "samples")


@pytest.mark.slow
def test_a_run_goes_through_all_commands_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["pace", "runs", "only=evdvae_gray", "dry=true", f"folder={tmp_path / 'runs'}"]
    assert main(words) == 0
    found = json.loads((tmp_path / "runs" / "families.json").read_text())["runs"]["evdvae_gray"]
    assert found["test"]["dimensions"] == 784
    assert (tmp_path / "runs" / found["run"] / "samples" / "samples.npz").exists()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("it was done before")

    monkeypatch.setattr(families, "fit_steps", never)
    monkeypatch.setattr(Comparison, "_call", never)
    assert main(words) == 0
