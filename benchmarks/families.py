"""Three families on Fashion-MNIST at one budget: `python -m benchmarks.families [PART ...]`.

    python -m benchmarks.families data_root=data/fashion_mnist
    python -m benchmarks.families table

NVAE, VDVAE and Efficient-VDVAE, of about 2.1 million parameters each, are trained by `train.py` for
as many steps as fit the budget, on one thread, in black and white and in 8-bit gray, as the
experiments FAMILY_binarized_fashion_mnist and FAMILY_fashion_mnist say; `evaluate.py` and
`sample.py` do the rest. Parts, all of them one after another where none is named:

pace    seconds of CPU time that a step takes, all families in turn
tune    as many short runs of each family, over what its paper leaves open, on validation images
runs    training, evaluation on all test images, samples
table   the table in Markdown, and the pictures

minutes=30        of one core, for the training of a run; steps follow from the pace
trial=4           the same, for a short run; NVAE's BN statistics need a few hundred steps
importance=10     draws of the importance-weighted bound
only=TEXT         runs whose names begin with it
data_root=FOLDER  of the data set; default: data/fashion_mnist
folder=FOLDER     of the runs; default: runs/families
out=FILE          of what was measured; default: benchmarks/results/families.json
pictures=FOLDER   default: docs/figures
dry=true          a few steps and images, to try the command; FILE and pictures go to FOLDER

The steps depend on the pace, which is measured once, and nothing else on the clock: on a busy
machine a run takes longer and gives the same numbers. Stopped or killed? The same command goes on
where it was. What is in FILE with the same settings is not done again.
"""

import logging
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.fit import compose_steps, fit_steps
from benchmarks.measure import SWITCH, read_words
from nvae.cli.common import versions
from nvae.cli.config import compose_train
from nvae.command_line import fail, setting
from nvae.data.config import SPLITS
from nvae.files import read_json, write_json
from nvae.pictures import save_rows
from nvae.training.checkpointing import newest_checkpoint

ROOT = Path(__file__).parent.parent
FAMILIES = {"nvae": "NVAE", "vdvae": "VDVAE", "evdvae": "Efficient-VDVAE"}
KINDS = {"binarized": "binarized_fashion_mnist", "gray": "fashion_mnist"}
CASES = [(f"{family}_{kind}", family, kind) for kind in KINDS for family in FAMILIES]
WHERE = ["trainer.accelerator=cpu", "trainer.devices=1", "trainer.cpu_threads=1"]
QUIET = [
    "callbacks.pictures=null", "logger.tensorboard=null", "logger.csv=null", "report.when=never",
    "trainer.check_val_every_n_epoch=100000",
]  # fmt: skip
TRIALS = {
    "nvae": ((1e-2, 0.999), (2e-2, 0.999), (2e-2, 0.99)),
    "vdvae": ((1e-3, 0.9), (2e-3, 0.9), (4e-3, 0.9)),
    "evdvae": ((2e-3, 0.99), (5e-3, 0.99), (1e-2, 0.99)),
}
"""Learning rate and beta2 of the short runs of each family, all in black and white."""

TEMPERATURES = (1.0, 0.7)
COLUMNS = 12
PACE_STEPS, PACE_ROUNDS = 6, 3
TRIAL_IMAGES, BOUND_IMAGES = 1000, 1000
HEAD = (
    "| | parameters | steps | s a step | negative ELBO, nats | reconstruction + KL | bits/dim "
    "| NLL of the first 1,000 |\n|---|---|---|---|---|---|---|---|"
)
DRY_DATA = ["data.format=random", *(f"data.{split}_size=8" for split in SPLITS)]


@dataclass(frozen=True)
class Options:
    """The command line."""

    parts: tuple[str, ...] = ()
    minutes: float = 30.0
    trial: float = 4.0
    importance: int = 10
    only: str = ""
    data_root: Path | None = None
    folder: Path = Path("runs/families")
    out: Path = Path("benchmarks/results/families.json")
    pictures: Path = Path("docs/figures")
    dry: bool = False


PARTS = ("pace", "tune", "runs", "table")
READ: dict[str, Any] = {
    "minutes": float, "trial": float, "importance": int, "only": str, "data_root": Path,
    "folder": Path, "out": Path, "pictures": Path,
    "dry": SWITCH,
}  # fmt: skip


def options_of(words: Sequence[str]) -> Options:
    """Read the command line.

    Raises:
        SystemExit: it has a word that means nothing; the line is printed.
    """
    options = read_words(Options(), words, PARTS, READ)
    if not min(options.minutes, options.trial, options.importance) > 0:
        raise fail("minutes, trial and importance must be above 0")
    if options.dry:
        options = replace(options, out=options.folder / "families.json", pictures=options.folder)
    return replace(options, parts=options.parts or PARTS)


class Terminated(BaseException):
    """SIGTERM: from a job's time limit, for one."""


@dataclass
class Comparison:
    """All runs of the command, by its options."""

    options: Options

    @property
    def _batch(self) -> int:
        return 4 if self.options.dry else 64

    def found(self, part: str) -> dict[str, Any]:
        """What was measured so far; another process may have added to it."""
        try:
            content = read_json(self.options.out)
        except FileNotFoundError:
            return {}
        except (ValueError, OSError) as error:
            raise fail(error) from None
        return dict(content.get(part, {}))

    def add(self, part: str, name: str, values: dict[str, Any]) -> None:
        """Keep a result at once."""
        self.options.out.parent.mkdir(parents=True, exist_ok=True)
        content = read_json(self.options.out) if self.options.out.exists() else {}
        write_json(self.options.out, content | {part: self.found(part) | {name: values}})

    def pace(self) -> None:
        """Time steps of all runs in turn; the fastest is the least disturbed one."""
        torch.set_num_threads(1)
        logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
        done = self.found("pace")
        wanted = [c for c in CASES if c[0].startswith(self.options.only) and c[0] not in done]
        seconds: dict[str, list[float]] = {name: [] for name, _, _ in wanted}
        parameters = {}
        for _ in range(1 if self.options.dry else PACE_ROUNDS):
            for name, family, kind in wanted:
                words = [_experiment(family, kind), *WHERE, f"data.batch_size={self._batch}"]
                config = compose_steps(words)
                fitted = fit_steps(config, 3 if self.options.dry else PACE_STEPS)
                seconds[name] += fitted.cpu_seconds[1:]
                parameters[name] = sum(p.numel() for p in fitted.module.model.parameters())
        for name, times in seconds.items():
            times.sort()
            self.add("pace", name, {
                "parameters": parameters[name], "steps": len(times),
                "fastest": round(times[0], 4), "median": round(statistics.median(times), 4),
            })  # fmt: skip
            print(f"{name}: {times[0]:.3f} s of CPU time a step", flush=True)

    def steps(self, name: str, minutes: float) -> int:
        """As many as fit the budget, in tens."""
        pace = self.found("pace")
        if name not in pace:
            raise fail(f"the pace of {name} is not measured: python -m benchmarks.families pace")
        steps = 10 * round(6 * minutes / pace[name]["fastest"])
        return 4 if self.options.dry else max(10, steps)

    def tune(self) -> None:
        """Short runs; of each the negative ELBO of the validation images."""
        for family, trials in TRIALS.items():
            for number, (rate, beta2) in enumerate(trials, 1):
                name = f"{family}_trial_{number}"
                if not name.startswith(self.options.only):
                    continue
                steps = self.steps(f"{family}_binarized", self.options.trial)
                what = {"learning_rate": rate, "beta2": beta2, "steps": steps}
                if _agrees(self.found("trials").get(name), what):
                    continue
                words = [f"optimizer.learning_rate={rate}", f"optimizer.beta2={beta2}"]
                words.append(_experiment(family, "binarized"))
                run, seconds = self._train(name, words, steps)
                elbo = self._evaluate(run, "valid", TRIAL_IMAGES, [])["negative_elbo"]
                self.add("trials", name, what | {"training_cpu_seconds": seconds, "valid": elbo})
                print(f"{name}: {elbo['mean']:.2f} nats, {steps} steps", flush=True)

    def runs(self) -> None:
        """The runs of the table."""
        for name, family, kind in CASES:
            if not name.startswith(self.options.only):
                continue
            steps = self.steps(name, self.options.minutes)
            draws = 2 if self.options.dry else self.options.importance
            what: dict[str, Any] = {
                "experiment": _experiment(family, kind), "steps": steps, "seed": 0,
                "images_a_step": self._batch, "importance_samples": draws,
                **_recipe(family, kind),
            }  # fmt: skip
            if _agrees(self.found("runs").get(name), what):
                continue
            run, seconds = self._train(name, [what["experiment"]], steps)
            result = self._evaluate(run, "test", None, [])
            bound = self._evaluate(run, "test", BOUND_IMAGES, [draws])
            self._sample(run)
            self.add("runs", name, what | {
                "run": run,
                "training_cpu_seconds": seconds,
                "versions": versions(torch.device("cpu")) | {"device": "one thread"},
                "test": result, "bound": bound,
            })  # fmt: skip
            print(f"{name}: {result['negative_elbo']['mean']:.2f} nats, {steps} steps", flush=True)

    def _data(self) -> list[str]:
        if self.options.dry:
            return DRY_DATA
        root = self.options.data_root
        return [] if root is None else [setting("data.root", root.resolve())]

    def _train(self, name: str, words: list[str], steps: int) -> tuple[str, float]:
        """Train, or go on; the run's name and the CPU time of all starts, start-up included.

        The schedules go by the run's length: one of another length is another run.
        """
        name = f"{name}_{steps}"
        folder = self.options.folder
        spent = folder / name / "cpu_seconds.json"
        words = [
            *words, *WHERE, *QUIET, *self._data(), f"name={name}", setting("runs_dir", folder),
            f"trainer.max_steps={steps}", f"optimizer.warmup_steps={steps // 20}",
            f"data.batch_size={self._batch}",
        ]  # fmt: skip
        self._call("train.py", words, name, spent)
        return name, round(sum(read_json(spent)), 1)

    def _evaluate(
        self, name: str, split: str, images: int | None, draws: list[int]
    ) -> dict[str, Any]:
        images = 20 if self.options.dry else images
        output = self.options.folder / name / f"{split}_{images or 'all'}.json"
        words = [f"split={split}", f"importance_samples={draws}", setting("output", output)]
        words += [f"max_images={images or 'null'}", "overwrite=true"]
        self._call("evaluate.py", [*self._checkpoint(name), *words, *self._data()], name)
        return dict(read_json(output)["result"])

    def _sample(self, name: str) -> None:
        words = [
            f"seeds=0-{COLUMNS - 1}", f"temperature={list(TEMPERATURES)}", "npz=true",
            "single_images=false", setting("output", self.options.folder / name / "samples"),
            "overwrite=true",
        ]  # fmt: skip
        self._call("sample.py", [*self._checkpoint(name), *words], name)

    def _checkpoint(self, name: str) -> list[str]:
        found = newest_checkpoint(self.options.folder / name / "checkpoints")
        assert found is not None  # the training has ended well
        return [setting("checkpoint", found.path), "device=cpu"]

    def _call(self, program: str, words: list[str], name: str, spent: Path | None = None) -> None:
        """Run a command on one thread; its CPU time is added to a file, however it ends."""
        self.options.folder.mkdir(parents=True, exist_ok=True)
        log = self.options.folder / f"{name}.log"
        with log.open("a") as file:
            command = [sys.executable, str(ROOT / program), *words]
            one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(command, stdout=file, stderr=file, env=one_thread)
            stopped: BaseException | None = None
            while True:
                try:
                    _, status, usage = os.wait4(process.pid, 0)
                    break
                except (KeyboardInterrupt, Terminated) as signaled:
                    stopped = signaled
                    if isinstance(signaled, Terminated):  # the terminal sends Ctrl-C to both
                        process.terminate()
        process.returncode = os.waitstatus_to_exitcode(status)
        if spent is not None and spent.parent.is_dir():
            earlier = read_json(spent) if spent.exists() else []
            write_json(spent, [*earlier, usage.ru_utime + usage.ru_stime])
        if stopped is not None:
            raise stopped
        if process.returncode:
            lines = log.read_text().splitlines() or ["it said nothing"]
            raise fail(f"{program} of {name} failed: {lines[-1]}; see {log}")

    def table(self) -> None:
        """Print the tables; make the pictures of the kinds that are whole."""
        lines = [line for kind in KINDS for line in self._lines(kind)]
        if lines:
            print(HEAD, *lines, sep="\n", flush=True)
        for kind in KINDS:
            self._picture(kind)
        if trials := self.found("trials"):
            print("\n| trial | rate, beta2 | steps | validation, nats |\n|---|---|---|---|")
        for name, each in sorted(trials.items()):
            family, elbo = FAMILIES[name.partition("_")[0]], each["valid"]["mean"]
            settings = f"{each['learning_rate']:g}, {each['beta2']:g}"
            print(f"| {family} | {settings} | {each['steps']} | {elbo:.2f} |")

    def _lines(self, kind: str) -> Iterator[str]:
        """NLL: of the first images alone, whose negative ELBO is in FILE too."""
        pace, runs = self.found("pace"), self.found("runs")
        for family, title in FAMILIES.items():
            name = f"{family}_{kind}"
            if name not in runs:
                continue
            test, (nll,) = runs[name]["test"], runs[name]["bound"]["importance_weighted"]
            yield (
                f"| {title}, {kind} | {pace[name]['parameters']:,} | {runs[name]['steps']:,} "
                f"| {pace[name]['fastest']:.2f} | {_nats(test['negative_elbo'])} "
                f"| {test['reconstruction']['mean']:.2f} + {test['kl']['mean']:.2f} "
                f"| {test['negative_elbo_bits_per_dim']['mean']:.4f} "
                f"| {_nats(nll['nll'])}, K = {nll['samples']} |"
            )

    def _picture(self, kind: str) -> None:
        rows, labels, runs = [], [], self.found("runs")
        for family, title in FAMILIES.items():
            run = runs.get(f"{family}_{kind}", {}).get("run", "")
            file = self.options.folder / run / "samples" / "samples.npz"
            if not file.exists():
                return
            images = torch.from_numpy(np.load(file)["images"])
            for temperature, row in zip(TEMPERATURES, images, strict=True):
                rows.append(row[..., 2:-2, 2:-2])
                labels.append(f"{title}, t = {temperature:g}")
        path = self.options.pictures / f"families_{kind}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_rows(path, rows, labels)
        print(f"\nsamples: {path}")


def _experiment(family: str, kind: str) -> str:
    return f"experiment={family}_{KINDS[kind]}"


def _recipe(family: str, kind: str) -> dict[str, Any]:
    """What a run's result depends on beside its length."""
    settings = compose_train([_experiment(family, kind)]).to_dict()
    return {part: settings[part] for part in ("model", "objective", "optimizer")}


def _agrees(kept: dict[str, Any] | None, what: dict[str, Any]) -> bool:
    return kept is not None and all(kept.get(key) == value for key, value in what.items())


def _nats(estimate: dict[str, float]) -> str:
    return f"{estimate['mean']:.2f} ± {estimate['standard_error']:.2f}"


def _stop(*_: object) -> None:
    raise Terminated


def main(words: Sequence[str]) -> int:
    """The command; its exit code."""
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    comparison = Comparison(options_of(words))
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        for part in PARTS:
            if part in comparison.options.parts:
                getattr(comparison, part)()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 128 + signal.SIGINT
    except Terminated:
        print("terminated; the same command goes on", file=sys.stderr)
        return 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
