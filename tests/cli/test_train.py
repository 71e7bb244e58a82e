"""`train.py` from end to end, as a user runs it."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import pytorch_lightning as pl
import torch
import torch._dynamo
import yaml
from PIL import Image
from rich.console import Console

from nvae.checkpoint import load_model
from nvae.cli import fitting, report, train
from nvae.cli.common import float32_products
from nvae.cli.config import compose_train
from nvae.cli.errors import UserError
from nvae.cli.report import ReportConfig, write_report
from nvae.models import NVAE
from nvae.training.run_folder import RunFolder
from tests.cli.checkpoints import DATA, write_checkpoint

ROOT = Path(__file__).parents[2]


def test_a_short_run_leaves_everything_a_run_should(tmp_path: Path) -> None:
    """Likelihoods, pictures, checkpoints, logs, configuration, versions; then it says what next."""
    job = subprocess.run(
        [
            sys.executable, str(ROOT / "train.py"), "debug=fast_run", f"runs_dir={tmp_path}",
            "name=r", "resume=auto", "callbacks.ema.decay=0.9", "callbacks.pictures.every_epochs=1",
            "checkpoint_cells=true",
        ],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert job.returncode == 0, job.stderr[-3000:]
    run = tmp_path / "r"
    for text in ("test negative ELBO", "bits/dim", "importance-weighted", "python sample.py"):
        assert text in job.stdout
    result = json.loads((run / "test_likelihood.json").read_text())
    assert result["images"] == 300
    for name in ("samples.png", "reconstructions.png"):
        assert str(run / name) in job.stdout
        with Image.open(run / name) as picture:
            assert min(picture.size) > 30
    model = load_model(run / "checkpoints" / "best.ckpt")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"] == model.config.to_dict()
    start = json.loads((run / "starts.jsonl").read_text())
    assert start["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert start["step"] == 0
    keys = set().union(*(json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()))
    assert keys >= {
        "step", "time", "train/loss", "train/reconstruction", "train/kl", "train/kl_balanced",
        "train/spectral", "train/batchnorm", "train/learning_rate", "train/images_per_second",
        "train/data_wait", "train/peak_memory_gib", "train/tflops",
        "train/beta", "train/lambda", "train/gradient_norm", "train/skipped_steps",
        "train_kl_group/00", "valid/negative_elbo", "valid/bits_per_dim", "valid_kl_group/00",
        "valid_active_units/00",
    }  # fmt: skip
    assert list((run / "tensorboard").glob("events*"))
    assert list(run.glob("csv/*/metrics.csv"))
    assert len(list((run / "pictures").glob("*.png"))) == 2


REPORT = ReportConfig(importance_samples=2, temperatures=[0.7], samples=4, chunk=8)
REPORTED = ["reconstructions.png", "samples.png", "test_likelihood.json"]


def _report(folder: Path, tf32: bool = False) -> list[str]:
    """What the report of a run in ``folder``, trained on the CPU, leaves there."""
    (folder / "checkpoints").mkdir(exist_ok=True)
    write_report(Console(soft_wrap=True), REPORT, DATA, "cpu", RunFolder(folder), tf32)
    return sorted(path.name for path in folder.iterdir() if path.is_file())


@pytest.mark.parametrize(("cores", "most"), [(1, 8), (2, 8), (3, 12)])
def test_a_start_takes_a_few_processes_a_core(
    cores: int, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More would only wait for each other, and hundreds would take the machine's memory."""
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setattr(train, "open_run_once", Mock(side_effect=RuntimeError("it starts")))

    def start(devices: int) -> None:
        overrides = ["debug=fast_run", "data.global_batch=64", f"trainer.devices={devices}"]
        train._train_in(tmp_path / "run", compose_train(overrides))

    with pytest.raises(UserError, match=f"more processes than {cores} cores.* at most {most}"):
        start(most + 1)
    assert not (tmp_path / "run").exists()
    with pytest.raises(RuntimeError, match="it starts"):
        start(most)


@pytest.mark.parametrize(("tf32", "said"), [(False, "float32"), (True, "float32 with tf32")])
def test_report_has_the_runs_device_and_arithmetic(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tf32: bool,
    said: str,
) -> None:
    """On the CPU that trained, whatever GPU there is; TF32 as the run says, and the report too."""
    write_checkpoint(tmp_path / "checkpoints" / "best.ckpt")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not tf32)
    inside, likelihood = [], report.test_likelihood

    def recorded(model: NVAE, *arguments: object) -> object:
        inside.append((torch.backends.cudnn.allow_tf32, model.initial_state.device.type))
        return likelihood(model, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(report, "test_likelihood", recorded)
    assert _report(tmp_path, tf32) == REPORTED
    assert inside == [(tf32, "cpu")]
    assert json.loads((tmp_path / "test_likelihood.json").read_text())["precision"] == said
    assert ("computed in float32 with tf32" in capsys.readouterr().out) == tf32
    assert torch.backends.cudnn.allow_tf32 != tf32  # of a sweep's next run


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_is_as_the_run_says_from_its_beginning_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tf32: bool
) -> None:
    """In training, validation and report; then as it was, whatever the image's own setting."""
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    seen = []

    class Probe(pl.Callback):
        def on_train_batch_end(self, *_: object) -> None:
            seen.append(("train", *(each.allow_tf32 for each in flags)))

        def on_validation_end(self, *_: object) -> None:
            seen.append(("valid", *(each.allow_tf32 for each in flags)))

    def reported(*arguments: object) -> None:
        seen.append(("report", *(each.allow_tf32 for each in flags)))
        assert arguments[-2:] == (tf32, "auto")

    build = fitting.build_callbacks
    monkeypatch.setattr(fitting, "build_callbacks", lambda entries: [*build(entries), Probe()])
    monkeypatch.setattr(train, "write_report", reported)
    config = compose_train(
        [
            "debug=fast_run",
            f"runs_dir={tmp_path}",
            "name=r",
            f"trainer.tf32={tf32}",
            "trainer.cpu_threads=1",
        ]
    )
    with float32_products(tf32=not tf32):
        train._train_here(tmp_path / "r", config)
        assert [each.allow_tf32 for each in flags] == [not tf32] * 2
    assert {stage for stage, *_ in seen} == {"train", "valid", "report"}
    assert all(now == [tf32, tf32] for _, *now in seen)


def test_report_without_a_best_takes_the_newest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that ended before its first validation has none."""
    for step in (3, 12):
        write_checkpoint(tmp_path / "checkpoints" / f"step_{step:08d}.ckpt")
    assert _report(tmp_path) == REPORTED
    out, err = capsys.readouterr()
    assert "no best.ckpt" in out
    assert f"python evaluate.py checkpoint={tmp_path}/checkpoints/step_00000012.ckpt" in out
    assert not err


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("sample_grid", "samples.png"),
        ("reconstruction_grid", "reconstructions.png"),
        ("evaluate", "test_likelihood.json"),
    ],
)
def test_report_that_fails_in_part_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    part: str,
    file: str,
) -> None:
    """At the end of a long run: what is safe, what is missing, and how to get it."""
    best = write_checkpoint(tmp_path / "checkpoints" / "best.ckpt")

    def no_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 30.00 GiB")

    monkeypatch.setattr(report, part, no_memory)
    assert _report(tmp_path) == [name for name in REPORTED if name != file]
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert err.startswith(f"the run is safe in {tmp_path}, but {file} could not be written")
    assert "CUDA out of memory. Tried to allocate 30.00 GiB" in err
    script, size = ("evaluate", "chunk") if part == "evaluate" else ("sample", "batch_size")
    assert f"python {script}.py checkpoint={best}" in err
    assert f"{size}=2" in err
    assert "tensorboard" in out


def test_report_without_any_checkpoint_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _report(tmp_path) == []
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"no checkpoint in {tmp_path}" in err
    assert f"name={tmp_path.name} resume=auto" in err


@pytest.mark.parametrize(("asked", "lines"), [(True, 1), (False, 0)])
def test_compile_on_the_cpu_says_that_it_may_not_pay(asked: bool, lines: int) -> None:
    """A digits-like model took 448 ms a step with it and 365 ms without."""
    config = compose_train(["trainer.accelerator=cpu", f"compile={asked}"])
    console = Console(record=True, soft_wrap=True, file=io.StringIO())
    folder = SimpleNamespace(passed_over=[], checkpoint=None, path="runs/r")
    train._announce(console, config, folder, [])  # type: ignore[arg-type]
    assert console.export_text().count("compile=true is meant for GPUs") == lines
