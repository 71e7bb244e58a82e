"""Kills tiny runs at random moments until they are done: `python -m benchmarks.kills kills=200`.

Each run is `train.py` on random images, on one process and on two that share a gloo group in turn,
with a checkpoint every few steps and a validation each epoch. SIGKILL comes at a random moment
after each start: to all processes at once, or to one of them a little before the others, as a
launcher does it. Then the same command is started again, until the run is done. Printed are the
promises that were broken; the exit code is 1 if there were any. `seed=`, `longest=` (seconds from a
start to its kill) and `ranks=1`, `2` or `1,2` are further settings.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from nvae.checkpoint import CheckpointError, load_checkpoint, load_model
from nvae.training.checkpointing import BEST, newest_checkpoint, step_checkpoints

EVERY_STEPS = 3
VOLATILE = ("time", "images_per_second", "data_wait", "peak_memory_gib", "tflops")
"""Ends of the names of metrics that no two runs share."""
EPOCHS = 8
SETTINGS = [
    "data=random", "data.image_size=8", "data.channels=1", "data.bits=4", "data.train_size=64",
    "data.valid_size=32", "data.test_size=8", "model.num_scales=1", "model.groups_per_scale=2",
    "model.preprocess_cells=1", "model.postprocess_cells=1", "model.encoder_channels=4",
    "model.decoder_channels=4", "model.latent_channels=2", "trainer.accelerator=cpu",
    "trainer.cpu_threads=1", "optimizer.warmup_epochs=0",
    "trainer.log_every_n_steps=1", "logger.tensorboard=null", "logger.csv=null",
    "callbacks.pictures.every_epochs=7", "callbacks.ema.decay=0.9",
    f"callbacks.checkpoint.every_steps={EVERY_STEPS}", "report.importance_samples=0",
    "report.samples=2", "report.temperatures=[1.0]",
]  # fmt: skip


@dataclass
class Count:
    """What happened; all but the first three break a promise.

    Attributes:
        kills: processes' ends by SIGKILL, one for all ranks of a run.
        resumed: starts that went on from a checkpoint.
        runs: that came to their end.
        lost: kills that left an older checkpoint as the newest good one than there was before.
        unreadable: files named as checkpoints that cannot be read.
        steps: trained and logged, and more of them than two intervals are not in a checkpoint: one
            that goes by, and one while a checkpoint is being written.
        different: runs that ended otherwise than one that nobody disturbed, in any bit.
    """

    kills: int = 0
    resumed: int = 0
    runs: int = 0
    lost: int = 0
    unreadable: int = 0
    steps: int = 0
    different: int = 0

    @property
    def is_clean(self) -> bool:
        """Whether no promise was broken."""
        return not (self.lost or self.unreadable or self.steps or self.different)

    def __str__(self) -> str:
        """One line."""
        return ", ".join(f"{each.name} {getattr(self, each.name)}" for each in fields(self))


class Processes:
    """All ranks of one start of the command, forked from a process that has imported everything."""

    def __init__(self, folder: Path, name: str, ranks: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, "nvae.cli.train"])
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        settings = [
            *SETTINGS, f"name={name}", f"data.batch_size={8 // ranks}",
            f"trainer.max_epochs={EPOCHS}",
        ]  # fmt: skip
        self.ranks: list[BaseProcess] = []
        for rank in range(ranks):
            arguments = (folder, settings, rank, ranks, port)
            self.ranks.append(context.Process(target=_train, args=arguments))
            self.ranks[-1].start()

    def ended(self, seconds: float) -> bool:
        """Whether all ranks end, well, within some time."""
        until = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, until - time.monotonic()))
        if any(process.exitcode not in (None, 0) for process in self.ranks):
            raise SystemExit(f"a run failed by itself: {[p.exitcode for p in self.ranks]}")
        return all(process.exitcode == 0 for process in self.ranks)

    def kill(self, moments: random.Random) -> None:
        """One after another in a random order, with or without a pause."""
        order = moments.sample(self.ranks, len(self.ranks))
        pause = moments.choice([0.0, moments.uniform(0, 0.3)])
        for process in order:
            if process is not order[0]:
                time.sleep(pause)
            process.kill()
        for process in order:
            process.join()


def _train(folder: Path, settings: list[str], rank: int, ranks: int, port: int) -> None:
    from nvae.cli.train import main as train

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.chdir(folder)
    out = os.open("out.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(out, stream.fileno())
    if ranks > 1:
        os.environ |= {
            "TORCHELASTIC_RUN_ID": "kills", "RANK": str(rank), "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        settings = [*settings, f"trainer.devices={ranks}"]
    sys.argv = ["train.py", *settings]
    train()


def state_of_end(run: Path) -> dict[str, Any]:
    """What two runs must agree in, bit for bit."""
    end = load_checkpoint(step_checkpoints(run / "checkpoints")[-1])
    best = load_checkpoint(run / "checkpoints" / BEST)
    whole = ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "callbacks")
    return {
        **{key: end[key] for key in whole},
        "best": [best["state_dict"], best["global_step"]],
        "metrics": [
            {k: v for k, v in line.items() if not k.endswith(VOLATILE)} for line in logged(run)
        ],
    }


def are_equal(a: Any, b: Any) -> bool:
    """All the way down, in every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(are_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(are_equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


def logged(run: Path) -> list[dict[str, Any]]:
    """Lines of `metrics.jsonl`, but for one that was being written."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def look(run: Path, newest_before: int, count: Count) -> int:
    """Check what a kill has left; the step of the newest good checkpoint, 0 for none."""
    paths = [*step_checkpoints(run / "checkpoints"), run / "checkpoints" / BEST]
    for path in paths:
        if path.exists():
            try:
                load_model(path)
                load_checkpoint(path)
            except CheckpointError as error:
                print(f"unreadable: {error}")
                count.unreadable += 1
    found = newest_checkpoint(run / "checkpoints")
    newest = 0 if found is None else int(found.content["global_step"])
    if newest < newest_before:
        print(f"lost: {run.name} was at step {newest_before}, its newest good one is {newest}")
        count.lost += 1
    trained = max((line["step"] for line in logged(run)), default=0)
    if trained - newest > 2 * EVERY_STEPS:
        print(f"steps: {run.name} had trained {trained} steps, {newest} of them are saved")
        count.steps += 1
    return newest


def disturb(
    folder: Path, name: str, ranks: int, kills: int, longest: float, moments: random.Random,
    count: Count,
) -> None:  # fmt: skip
    """Start a run, kill it, and again, until it is done or ``kills`` are reached."""
    run, newest = folder / "runs" / name, 0
    while True:
        processes = Processes(folder, name, ranks)
        count.resumed += newest > 0
        is_last = count.kills >= kills
        if processes.ended(600 if is_last else moments.uniform(0.1, longest)):
            return
        if is_last:
            raise SystemExit(f"{name} does not end")
        processes.kill(moments)
        count.kills += 1
        newest = look(run, newest, count)


def main(
    kills: int = 200, seed: int = 0, longest: float = 15, ranks: Sequence[int] = (1, 2)
) -> int:
    """Print the counts; 1 where a promise was broken."""
    moments, count = random.Random(seed), Count()
    with tempfile.TemporaryDirectory() as temporary:
        folder, whole = Path(temporary), {}
        for number in ranks:
            if not Processes(folder, f"whole{number}", number).ended(600):
                raise SystemExit("the undisturbed run does not end")
            whole[number] = state_of_end(folder / "runs" / f"whole{number}")
        while count.kills < kills:
            number = ranks[count.runs % len(ranks)]
            name = f"run{count.runs}"
            disturb(folder, name, number, kills, longest, moments, count)
            if not are_equal(state_of_end(folder / "runs" / name), whole[number]):
                print(f"different: {name} on {number} process(es)")
                count.different += 1
            shutil.rmtree(folder / "runs" / name)
            count.runs += 1
            print(count, flush=True)
    return 0 if count.is_clean else 1


if __name__ == "__main__":
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    kinds: dict[str, Callable[[str], Any]] = {
        "kills": int,
        "seed": int,
        "longest": float,
        "ranks": lambda text: [int(each) for each in text.split(",")],
    }
    sys.exit(main(**{key: kinds[key](value) for key, value in given.items()}))
