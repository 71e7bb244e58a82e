"""How many processes a run has, from what the user, torchrun, SLURM and torch say."""

import pytest
import torch

from nvae.training.processes import count_processes
from nvae.training.trainer import TrainerConfig

LAUNCHERS = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "NODE_RANK",
             "GROUP_RANK", "SLURM_NTASKS", "SLURM_NNODES", "SLURM_JOB_NAME")  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Started by hand, on a machine with six GPUs."""
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 6)


def _torchrun(monkeypatch: pytest.MonkeyPatch, world: int, on_a_machine: int) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(on_a_machine))


def test_auto_takes_every_gpu_and_one_process_on_the_cpu() -> None:
    assert count_processes("auto", 1, "gpu") == (6, 1)
    assert count_processes("auto", 1, "cpu") == (1, 1)
    assert count_processes(2, 1, "gpu") == (2, 1)


def test_the_cpu_takes_a_bounded_number_whatever_the_machine() -> None:
    """A configuration is composed on other machines than the one it runs on."""
    assert TrainerConfig(accelerator="cpu", devices=128).devices == 128
    with pytest.raises(ValueError, match="on the CPU it must be at most 128 processes"):
        TrainerConfig(accelerator="cpu", devices=129)


def test_auto_takes_what_torchrun_started(monkeypatch: pytest.MonkeyPatch) -> None:
    _torchrun(monkeypatch, 24, 8)
    assert count_processes("auto", 1, "gpu") == count_processes("auto", 3, "gpu") == (8, 3)
    with pytest.raises(ValueError, match="num_nodes=2, but the run was started on 3 machine"):
        count_processes("auto", 2, "gpu")
    config = TrainerConfig(accelerator="cpu", devices="auto")
    assert (config.devices, config.num_nodes, config.world_size) == (8, 3, 24)


def test_auto_takes_what_srun_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NAME", "nvae")
    monkeypatch.setenv("SLURM_NTASKS", "16")
    monkeypatch.setenv("SLURM_NNODES", "2")
    assert count_processes("auto", 1, "gpu") == (8, 2)
    monkeypatch.setenv("SLURM_NTASKS", "15")
    with pytest.raises(ValueError, match="15 processes on 2 machines; every machine has to have"):
        count_processes("auto", 1, "gpu")


def test_several_machines_need_a_start_on_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once and in one line, instead of waiting for the others for half an hour."""
    for devices in ("auto", 8):
        with pytest.raises(ValueError, match="num_nodes=3, but this process was started alone"):
            count_processes(devices, 3, "gpu")
    assert count_processes(8, 3, "gpu", has_environment=True) == (8, 3)
    monkeypatch.setenv("MASTER_ADDR", "head")
    monkeypatch.setenv("NODE_RANK", "1")
    assert count_processes(8, 3, "gpu") == (8, 3)
    assert count_processes("auto", 3, "gpu") == (6, 3)


def test_a_plugin_may_know_the_machines() -> None:
    plugins = [{"_target_": "my.cluster.Environment"}]
    config = TrainerConfig(accelerator="cpu", devices=8, num_nodes=3, plugins=plugins)  # type: ignore[call-arg]
    assert config.world_size == 24
