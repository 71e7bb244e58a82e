"""The report at the end of training: made now or later, by one process or by all."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nvae.cli.config import TrainConfig
from nvae.cli.report import ReportConfig, write_report
from nvae.training.run_folder import RunFolder
from tests.hostile.runs import train
from tests.training.ranks import run_ranks
from tests.training.runs import run, small_config

REPORT = ReportConfig(importance_samples=5, samples=2, temperatures=[1.0], chunk=11)


def _config(root: Path) -> TrainConfig:
    config = small_config(root)
    config.trainer.max_epochs = 1
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, _ = run(_config(tmp_path_factory.mktemp("trained")))
    return folder


def _report(rank: int, world: int, folder: str, fails: int | None) -> str:
    if rank == fails:
        pytest.MonkeyPatch().setattr("nvae.evaluation.likelihood.bound_images", _broken)
    path, console = Path(folder), Console(quiet=True)
    with contextlib.redirect_stderr(io.StringIO()) as err:
        write_report(console, REPORT, _config(path.parent).data, "cpu", RunFolder(path))
    return err.getvalue()


def _broken(*_: Any) -> None:
    raise MemoryError("nothing left")


def test_ranks_share_the_images_and_the_number_is_that_of_one_process(trained: Path) -> None:
    """Exactly: passes are cut as one process cuts them, with seven images among two ranks."""
    file = trained / "test_likelihood.json"
    found = []
    for world in (1, 2):
        file.unlink(missing_ok=True)
        run_ranks(_report, world, str(trained), None)
        found.append(json.loads(file.read_text()))
    assert found[0] == found[1]
    assert found[0]["images"] == 7


@pytest.mark.parametrize("fails", [0, 1])
def test_a_rank_that_fails_in_it_is_one_line_and_nobody_waits(trained: Path, fails: int) -> None:
    (trained / "test_likelihood.json").unlink(missing_ok=True)
    told, silent = run_ranks(_report, 2, str(trained), fails)
    assert silent == ""
    assert told.count("\n") == 1
    assert "test_likelihood.json could not be written" in told
    assert "MemoryError: nothing left" in told
    assert not (trained / "test_likelihood.json").exists()


def test_left_out_it_is_made_by_the_same_command_later(tmp_path: Path) -> None:
    ended = train(tmp_path, "report.when=never")
    assert (ended.code, ended.err) == (0, "")
    assert "this command with name=r resume=auto report.when=end makes it" in ended.out
    assert not (tmp_path / "runs" / "r" / "samples.png").exists()
    again = train(tmp_path, "report.when=end")
    assert (again.code, again.err) == (0, "")
    assert "nothing was trained" in " ".join(again.out.split())
    assert (tmp_path / "runs" / "r" / "samples.png").exists()


def test_when_is_one_of_two() -> None:
    with pytest.raises(ValueError, match=r"report\.when='later' is unknown; allowed: end, never"):
        ReportConfig(when="later")
