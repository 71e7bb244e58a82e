"""GPUs that are there and of no use are an error with the remedy, never a run on the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nvae import gpus
from nvae.cli.common import open_device
from nvae.training.trainer import TrainerConfig


def _no_process(*_: Any, **__: Any) -> Any:
    raise AssertionError("a process was started")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One without anything of NVIDIA's; torch sees no GPU."""
    monkeypatch.setattr(gpus, "DRIVER", tmp_path / "driver")
    monkeypatch.setattr(gpus, "DEVICES", tmp_path / "dev")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpus.subprocess, "run", _no_process)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "dev").mkdir()
    return tmp_path


@pytest.fixture
def unusable(machine: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One with a driver and eight GPUs that torch cannot use."""
    (machine / "driver" / "gpus" / "0000:01:00.0").mkdir(parents=True)
    (machine / "dev" / "nvidia0").touch()

    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nX")

    monkeypatch.setattr(torch.cuda, "init", too_old)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return machine


@pytest.mark.parametrize("accelerator", ["auto", "gpu"])
def test_training_says_what_to_do(unusable: Path, accelerator: str) -> None:
    with pytest.raises(ValueError, match=r"has NVIDIA GPUs, but torch .* sees none") as caught:
        TrainerConfig(accelerator=accelerator)
    line = str(caught.value)
    assert "driver on your system is too old (found version 11040); this build" in line
    assert "needs a driver for CUDA 13.0: update the driver, or install torch for an older" in line
    assert line.endswith("or set trainer.accelerator=cpu to work on the CPU knowingly")
    assert "\n" not in line


def test_a_build_without_cuda_is_named(unusable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ValueError, match="build of torch has no CUDA: install one that has"):
        TrainerConfig(accelerator="auto")


def test_so_do_sampling_and_evaluation(unusable: Path) -> None:
    with pytest.raises(ValueError, match="or set device=cpu to work on the CPU knowingly"):
        open_device("auto", tf32=False)
    assert open_device("cpu", tf32=False).type == "cpu"


def test_the_cpu_may_be_wanted(unusable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert TrainerConfig(accelerator="cpu").resolved_accelerator() == "cpu"
    for hidden in ("", "-1", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert TrainerConfig(accelerator="auto").resolved_accelerator() == "cpu"
    for shown in ("0", "0,1", "GPU-8932f937", "MIG-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        with pytest.raises(ValueError, match="sees none"):
            TrainerConfig(accelerator="auto")


def test_devices_that_others_have_are_no_error(unusable: Path) -> None:
    """A container without GPUs shows the host's driver, and no device."""
    (unusable / "dev" / "nvidia0").unlink()
    (unusable / "dev" / "nvidiactl").touch()
    assert TrainerConfig(accelerator="auto").resolved_accelerator() == "cpu"


def test_a_machine_without_any_is_no_error(machine: Path) -> None:
    """And nothing is asked for them."""
    assert TrainerConfig(accelerator="auto").resolved_accelerator() == "cpu"
    with pytest.raises(ValueError, match="accelerator=gpu, but torch sees no GPU; use cpu or auto"):
        TrainerConfig(accelerator="gpu")


@pytest.mark.parametrize(
    ("listed", "there"), [("GPU 0: NVIDIA X\n", True), ("No devices\n", False)]
)
def test_windows_subsystem_for_linux_is_asked(
    machine: Path, monkeypatch: pytest.MonkeyPatch, listed: str, there: bool
) -> None:
    (machine / "dev" / "dxg").touch()
    tool = machine / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '{listed}'\n")
    tool.chmod(0o755)
    monkeypatch.undo()
    monkeypatch.setattr(gpus, "DRIVER", machine / "driver")
    monkeypatch.setattr(gpus, "DEVICES", machine / "dev")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", f"{machine}:/bin:/usr/bin")
    if there:
        with pytest.raises(ValueError, match="sees none"):
            gpus.is_gpu_usable("device=cpu")
    else:
        assert not gpus.is_gpu_usable("device=cpu")
