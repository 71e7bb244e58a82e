"""How fast batches reach the model: nvae.data against a plain torchvision + PIL pipeline.

    python -m benchmarks.data [--device cuda] [--workers 2] [--json data.json]

Both sides read the same random pictures in shuffled order, flip them at random and end in float32
batches in [0, 1] on the device. The plain side is what torchvision's data sets do: at 32x32 an
array in memory, a PIL image for each item (as CIFAR10 does); at 256x256 a folder of JPEG files
(ImageFolder). Rounds alternate, so that other work on the machine disturbs both alike.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder, VisionDataset
from torchvision.transforms import Compose, RandomHorizontalFlip, ToTensor

from nvae.data.config import DataConfig
from nvae.data.conversion import prepare
from nvae.data.dataset import ImageData


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    size: int
    images: int
    batch_size: int
    goal: float


CASES = (Case(32, 20_000, 128, 10.0), Case(256, 800, 16, 5.0))


@dataclass(frozen=True)
class Result:
    """Median images/s of both sides."""

    size: int
    batch_size: int
    workers: int
    device: str
    plain: float
    ours: float
    ratio: float
    goal: float


class ArrayImages(VisionDataset):
    """Pictures in an array, handed out as torchvision's CIFAR10 does."""

    def __init__(self, images: NDArray[np.uint8], transform: Callable[[Any], Tensor]) -> None:
        super().__init__(root="", transform=transform)
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        assert self.transform is not None
        return self.transform(Image.fromarray(self.images[index])), 0


def make_pictures(case: Case) -> NDArray[np.uint8]:
    """Smooth noise: it compresses about as well as photographs do."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (case.images, case.size // 4, case.size // 4, 3), np.uint8)
    return np.stack(
        [
            np.asarray(
                Image.fromarray(image).resize((case.size, case.size), Image.Resampling.BICUBIC)
            )
            for image in small
        ]
    )


def write_jpegs(pictures: NDArray[np.uint8], folder: Path) -> None:
    folder.mkdir(parents=True)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{i:06d}.jpg", quality=95)


def plain_batches(
    case: Case, pictures: NDArray[np.uint8], folder: Path, workers: int
) -> Callable[[], Iterator[Tensor]]:
    """An epoch of the plain pipeline."""
    transform = Compose([RandomHorizontalFlip(), ToTensor()])
    data_set: VisionDataset = (
        ArrayImages(pictures, transform) if case.size <= 64 else ImageFolder(folder, transform)
    )
    loader: DataLoader[Any] = DataLoader(
        data_set,
        batch_size=case.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return lambda: (x for x, _ in loader)


def our_batches(
    case: Case, folder: Path, workers: int, device: torch.device
) -> Callable[[], Iterator[Tensor]]:
    """An epoch of nvae.data, from a prepared folder through the memory map."""
    config = DataConfig(
        name="benchmark",
        format="folder",
        source=str(folder),
        root=str(folder.parent / "prepared"),
        image_size=case.size,
        channels=3,
        bits=8,
        likelihood="logistic_mixture",
        flip=True,
        batch_size=case.batch_size,
        num_workers=workers,
        on_device="never",
        valid_size=1,
        test_size=0,
    )
    prepare(config)
    data = ImageData(config)
    data.setup()
    loader = data.train_loader()

    def batches() -> Iterator[Tensor]:
        for raw in loader:
            assert raw.images is not None
            images, indices = raw.images.to(device), raw.indices.to(device)
            yield data.to_input(raw._replace(images=images, indices=indices)).x

    return batches


def images_per_second(batches: Iterator[Tensor], device: torch.device) -> float:
    """One epoch, without its first batch (which starts workers)."""
    next(batches).to(device)
    count, start = 0, time.perf_counter()
    for x in batches:
        count += len(x.to(device))
    if device.type == "cuda":
        torch.cuda.synchronize()
    return count / (time.perf_counter() - start)


def run_case(case: Case, *, workers: int, device: torch.device, rounds: int) -> Result:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "pictures")
        pictures = make_pictures(case)
        write_jpegs(pictures, folder / "all")
        plain = plain_batches(case, pictures, folder, workers)
        ours = our_batches(case, folder / "all", workers, device)
        speeds: dict[str, list[float]] = {"plain": [], "ours": []}
        for _ in range(rounds):
            speeds["plain"].append(images_per_second(plain(), device))
            # Several short epochs, so that the two sides are timed for similar spans.
            speeds["ours"] += [images_per_second(ours(), device) for _ in range(5)]
    medians = {side: statistics.median(values) for side, values in speeds.items()}
    return Result(
        size=case.size,
        batch_size=case.batch_size,
        workers=workers,
        device=str(device),
        ratio=medians["ours"] / medians["plain"],
        goal=case.goal,
        **medians,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, help="torch's threads for the transform")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the results here as well")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    results = [
        run_case(
            case,
            workers=arguments.workers,
            device=torch.device(arguments.device),
            rounds=arguments.rounds,
        )
        for case in CASES
    ]
    print(
        f"{'images':>10} {'batch':>6} {'plain, images/s':>16} {'nvae, images/s':>15} {'ratio':>6}"
    )
    for row in results:
        print(
            f"{row.size:>4}x{row.size}x3 {row.batch_size:>6} {row.plain:>16,.0f} "
            f"{row.ours:>15,.0f} {row.ratio:>6.1f}  (goal {row.goal:g})"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
