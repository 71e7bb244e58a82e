"""BN recalibration as the commands do it: from the cache beside the checkpoint, or anew."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nvae.bn_recalibration import (
    RecalibratedStatistics,
    RecalibrationSettings,
    cache_path,
    load_statistics,
    recalibrate,
    save_statistics,
)
from nvae.cli.progress import progress_bar
from nvae.models import HierarchicalVAE


@contextmanager
def recalibrated(
    model: HierarchicalVAE,
    checkpoint: Path,
    temperature: Sequence[float],
    *,
    batches: int,
    batch_size: int,
    seed: int,
    shown: bool = True,
) -> Iterator[None]:
    """Statistics for ``temperature`` (one a group) inside the block."""
    settings = RecalibrationSettings(
        tuple(float(t) for t in temperature), batches, batch_size, seed
    )
    with _statistics(model, checkpoint, settings, shown).applied(model):
        yield


def _statistics(
    model: HierarchicalVAE, checkpoint: Path, settings: RecalibrationSettings, shown: bool
) -> RecalibratedStatistics:
    path = cache_path(checkpoint, settings)
    found = load_statistics(path, settings, model)
    if found is None:
        with progress_bar("BN recalibration", settings.batches, shown=shown) as advance:
            found = recalibrate(model, settings, advance)
        if shown:
            _keep(found, path)
    return found


def _keep(statistics: RecalibratedStatistics, path: Path) -> None:
    try:
        save_statistics(statistics, path)
    except OSError as error:  # a read-only folder is no reason to lose the passes
        print(f"BN statistics are not kept for another time: {error}", file=sys.stderr)
