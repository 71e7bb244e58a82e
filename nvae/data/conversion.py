"""Source pictures -> prepared splits: decode in threads, crop, resize, write in order."""

import os
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nvae.data.config import DataConfig
from nvae.data.images import BadImageError, decode, fit, fit_array
from nvae.data.manifest import DataError
from nvae.data.readers.source import Item, Part
from nvae.data.splits import draw_splits, split_counts
from nvae.data.store_writer import SplitWriter, StoreWriter
from nvae.data.tables import SPLITS, TRAIN

_CHUNK = 32
_NAMES_KEPT = 100

Progress = Callable[[int, int], None]
"""Called with (pictures done, pictures in all)."""


@dataclass(frozen=True)
class Plan:
    """Which picture of which part goes to which split.

    Attributes:
        counts: pictures by split, before unreadable ones are left out.
        destination: for each part, the number in `SPLITS` of every picture, -1 for none.
        rule: the same in words.
    """

    counts: dict[str, int]
    destination: dict[str, NDArray[np.int8]]
    rule: str


def plan_splits(parts: dict[str, Part], config: DataConfig) -> Plan:
    """Decide the splits before any picture is read.

    Raises:
        DataError: The source cannot give the sizes that the config asks for.
    """
    available = {split: part.count for split, part in parts.items()}
    wanted = {split: getattr(config, f"{split}_size") for split in SPLITS}
    try:
        counts = split_counts(available, wanted)
    except ValueError as error:
        raise DataError(str(error)) from error
    drawn = {split: 0 if split in parts else counts[split] for split in SPLITS[1:]}
    destination = {
        split: np.full(count, SPLITS.index(split) if counts[split] else -1, dtype=np.int8)
        for split, count in available.items()
    }
    rule = "as in the source"
    if any(drawn.values()):
        indices = draw_splits(available[TRAIN], *drawn.values(), seed=config.split_seed)
        for split, rows in indices.items():
            destination[TRAIN][rows.numpy()] = SPLITS.index(split)
        names = " and ".join(split for split, count in drawn.items() if count)
        rule = f"{names} drawn from the source's training part (draw_splits, version 1, seed "
        rule += f"{config.split_seed})"
    return Plan(counts, destination, rule)


def _with_split(part: Part, destination: NDArray[np.int8]) -> Iterator[tuple[int, Item]]:
    """The pictures that go to a split, each with its number."""
    items = part.items()
    for split in destination:
        item = next(items, None)
        if item is None:
            raise DataError("the source holds fewer pictures than it says, or changed meanwhile")
        if split >= 0:
            yield int(split), item
    if next(items, None) is not None:
        raise DataError("the source holds more pictures than it says, or changed meanwhile")


def _to_array(item: Item, config: DataConfig) -> NDArray[np.uint8] | BadImageError:
    try:
        loaded = item.load()
        if isinstance(loaded, bytes):
            picture = decode(loaded, config.channels)
            return fit(picture, size=config.stored_size, config=config)
        size, channels = config.stored_size, config.channels
        return fit_array(loaded, size=size, channels=channels, config=config)
    except BadImageError as error:
        return error
    except OSError as error:
        return BadImageError(f"it cannot be read: {error.strerror or error}")


def _map_in_order(
    items: Iterator[tuple[int, Item]], config: DataConfig, workers: int
) -> Iterator[tuple[int, Item, NDArray[np.uint8] | BadImageError]]:
    """Decode chunks of pictures in threads (PIL holds no interpreter lock); results in order."""

    def work(
        chunk: list[tuple[int, Item]],
    ) -> list[tuple[int, Item, NDArray[np.uint8] | BadImageError]]:
        return [(split, item, _to_array(item, config)) for split, item in chunk]

    pending: deque[Future[list[tuple[int, Item, NDArray[np.uint8] | BadImageError]]]] = deque()
    # PIL's warnings about damaged pictures are several lines each; set for all threads at once.
    with (
        warnings.catch_warnings(action="ignore"),
        ThreadPoolExecutor(workers, thread_name_prefix="nvae-prepare") as pool,
    ):
        try:
            while chunk := list(islice(items, _CHUNK)):
                pending.append(pool.submit(work, chunk))
                if len(pending) > 2 * workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def check_space(folder: Path, counts: dict[str, int], config: DataConfig) -> None:
    """Stop before the work if the disk cannot hold the result.

    Raises:
        DataError: Not enough room.
    """
    needed = sum(counts.values()) * config.stored_size**2 * config.channels
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{folder} needs {needed / 1e9:.1f} GB for {sum(counts.values())} images, only "
            f"{free / 1e9:.1f} GB are free: choose another data.root"
        )


def convert(
    parts: dict[str, Part],
    plan: Plan,
    writer: StoreWriter,
    config: DataConfig,
    *,
    skip_bad: bool,
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Write every picture of the source to its split.

    Args:
        parts: of the source.
        plan: made from them.
        writer: an open store.
        config: crop, resize, size and channels.
        skip_bad: leave unreadable pictures out instead of stopping at the first.
        workers: decoding threads; None takes one for each core, eight at most.
        progress: told after every chunk or so.

    Returns:
        The first pictures that were left out, with the reason.

    Raises:
        DataError: An unreadable picture, or nothing is left of the training split.
    """
    size = config.stored_size
    shape = (size, size, config.channels)
    ragged = config.crop == "random"
    writers: dict[int, SplitWriter] = {
        SPLITS.index(split): writer.split(split, shape, ragged=ragged)
        for split, count in plan.counts.items()
        if count
    }
    skipped: list[str] = []
    total, done = sum(plan.counts.values()), 0
    for part_name, part in parts.items():
        destination = plan.destination[part_name]
        items = _with_split(part, destination)
        workers = workers or min(8, os.cpu_count() or 1)
        for split, item, result in _map_in_order(items, config, workers):
            if isinstance(result, BadImageError):
                if not skip_bad:
                    raise DataError(f"{item.name} cannot be used: {result}") from result
                writers[split].skipped += 1
                if len(skipped) < _NAMES_KEPT:
                    skipped.append(f"{item.name}: {result}")
            else:
                writers[split].add(result)
            done += 1
            if progress is not None and (done % _CHUNK == 0 or done == total):
                progress(done, total)
    if not writers[SPLITS.index(TRAIN)].count:
        raise DataError(f"none of the {total} pictures can be read; {skipped[0]}")
    return skipped
