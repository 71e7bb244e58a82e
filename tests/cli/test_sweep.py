"""Several runs from one command: multirun, launchers, searches."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml

from nvae.cli.errors import folder_name
from nvae.cli.train import final_metric
from tests.hostile.runs import Ended, train


def _starts(folder: Path) -> list[int]:
    """The step that each start of a run went on from."""
    return [json.loads(line)["step"] for line in (folder / "starts.jsonl").read_text().splitlines()]


def _validations(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["valid/negative_elbo"] for line in lines if "valid/negative_elbo" in line]


def test_every_job_trains_in_a_folder_of_its_own_and_resumes(tmp_path: Path) -> None:
    jobs = [tmp_path / "runs" / "r_sweep" / f"seed-{seed}" for seed in (0, 1)]
    first = train(tmp_path, "seed=0,1", "data.seed=3", "trainer.max_epochs=1", "-m")
    assert first.code == 0, first
    assert [_starts(job) for job in jobs] == [[0], [0]]
    assert len({_validations(job)[0] for job in jobs}) == 2
    longer = train(tmp_path, "seed=0,1", "data.seed=3", "-m")
    assert longer.out.count("resumed from step_00000008.ckpt") == 2, longer
    again = train(tmp_path, "seed=0,1", "data.seed=3", "-m")
    assert again.code == 0
    assert again.out.count("is finished: 2 epochs") == 2
    for job in jobs:
        assert _starts(job) == [0, 8, 16]
        assert final_metric(job, "valid/negative_elbo") == pytest.approx(min(_validations(job)))
        config = yaml.safe_load((job / "config.yaml").read_text())
        assert (config["runs_dir"], config["name"]) == ("runs/r_sweep", job.name)
        assert _starts(job)[0] == 0
    # and each can be gone on with alone
    alone = train(tmp_path, "runs_dir=runs/r_sweep", "name=seed-0", "data.seed=3", "resume=must")
    assert "is finished" in alone.out


def test_one_jobs_error_names_the_job_and_the_others_train(tmp_path: Path) -> None:
    ended = train(tmp_path, "model.num_scales=1,9,2", "-m")
    assert ended.code == 2
    errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: job 1 (model.num_scales-9): model.image_size=8 cannot be")
    sweep = tmp_path / "runs" / "r_sweep"
    trained = sorted(path.name for path in sweep.iterdir() if path.is_dir())
    assert trained == ["model.num_scales-1", "model.num_scales-2"]


def test_metric_of_another_name(tmp_path: Path) -> None:
    ended = train(tmp_path, "trainer.max_epochs=1")
    assert ended.code == 0, ended
    folder = tmp_path / "runs" / "r"
    assert final_metric(folder, "valid/kl") >= 0
    with pytest.raises(
        Exception, match=r"optimized_metric=valid/fid was not logged; allowed: .*kl"
    ):
        final_metric(folder, "valid/fid")


def test_names_of_jobs() -> None:
    assert folder_name("seed-0+model.num_scales-2") == "seed-0+model.num_scales-2"
    assert folder_name("") == "job"
    names = [folder_name(each) for each in ("data.root-/a b", "data.root-/a_b", "x-" + "y" * 500)]
    assert len(set(names)) == 3
    for name in names:
        assert re.fullmatch(r"[\w.+-]{1,200}", name), name


def _search(folder: Path) -> Ended:
    params = 'hydra.sweeper.params={optimizer.learning_rate:"interval(1e-3, 1e-2)"}'
    return train(folder, "sweep=optuna", "hydra.sweeper.n_trials=2", params)


@pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="needs nvae[sweep]")
def test_search_with_optuna(tmp_path: Path) -> None:
    ended = _search(tmp_path)
    assert ended.code == 0, ended
    sweep = tmp_path / "runs" / "r_sweep"
    trials = [path for path in sweep.iterdir() if path.is_dir()]
    assert len(trials) == 2
    found = yaml.safe_load((sweep / "optimization_results.yaml").read_text())
    best = min(trials, key=lambda trial: final_metric(trial, "valid/negative_elbo"))
    assert found["best_value"] == pytest.approx(min(_validations(best)))
    assert f"optimizer.learning_rate-{found['best_params']['optimizer.learning_rate']}" in best.name
    again = _search(tmp_path)
    assert again.out.count("is finished") == 2


@pytest.mark.skipif(importlib.util.find_spec("optuna") is not None, reason="it is here")
def test_search_says_what_to_install(tmp_path: Path) -> None:
    ended = train(tmp_path, "sweep=optuna")
    assert ended.code == 2
    assert "pip install 'nvae[sweep]'" in ended.err
