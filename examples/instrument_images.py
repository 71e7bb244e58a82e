"""Images as instruments give them, made up: 12-bit scans of 96x64 and five-channel tiles of 32x32.

    python examples/instrument_images.py

writes `instrument/scans` and `instrument/tiles`, NPY arrays (N, H, W, C) called train, valid and
test. docs/data.md trains on both.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SPLITS = {"train": 512, "valid": 32, "test": 48}


def coordinates(height: int, width: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Row and column of every pixel in units of the width, as arrays ``(height, width)``."""
    y, x = np.mgrid[0:height, 0:width] / width
    return y, x


def scan(random: np.random.Generator) -> NDArray[np.uint16]:
    """A gray ellipse with a bright rim and some spots inside, ``(96, 64, 1)`` of 12 bits."""
    y, x = coordinates(96, 64)
    center_y, center_x = 0.75 + random.normal(0, 0.08), 0.5 + random.normal(0, 0.05)
    height, width = random.uniform(0.4, 0.6), random.uniform(0.25, 0.4)
    radius = ((y - center_y) / height) ** 2 + ((x - center_x) / width) ** 2
    image = 900 / (1 + np.exp((radius - 1) * 12)) + 500 * ((radius > 0.8) & (radius < 1))
    for _ in range(random.integers(2, 6)):
        spot_y = center_y + random.uniform(-0.6, 0.6) * height
        spot_x = center_x + random.uniform(-0.6, 0.6) * width
        distance = ((y - spot_y) ** 2 + (x - spot_x) ** 2) / random.uniform(0.03, 0.12) ** 2
        image += random.uniform(300, 2200) * np.exp(-distance)
    image = image * (0.85 + 0.2 * y) + random.normal(120, 12, image.shape)
    return np.clip(np.rint(image), 0, 4095).astype(np.uint16)[..., None]


FIELD = np.linspace(0.2, 0.5, 5)
SOIL = np.array([0.5, 0.7, 1.0, 1.2, 1.3])
COVERS = np.array([[0.1, 0.25, 0.1, 0.7, 0.6], [0.15, 0.15, 0.2, 0.05, 0.02]])  # trees, water


def tile(random: np.random.Generator) -> NDArray[np.uint16]:
    """Soil with disks of trees and water, ``(32, 32, 5)`` of 10 bits."""
    y, x = coordinates(32, 32)
    (down, across), (start_y, start_x) = random.uniform(6, 24, 2), random.uniform(0, 6, 2)
    soil = 0.15 * (np.sin(across * x + start_x) * np.sin(down * y + start_y))[..., None] * SOIL
    image = FIELD + random.normal(0, 0.03) + soil
    for _ in range(random.integers(1, 5)):
        center_y, center_x = random.uniform(0.1, 0.9, 2)
        inside = (y - center_y) ** 2 + (x - center_x) ** 2 < random.uniform(0.06, 0.2) ** 2
        image = np.where(inside[..., None], COVERS[random.integers(2)] + 0.3 * soil, image)
    image = image + random.normal(0, 0.01, image.shape)
    return np.clip(np.rint(image * 1023), 0, 1023).astype(np.uint16)


if __name__ == "__main__":
    random = np.random.default_rng(0)
    for name, draw in (("scans", scan), ("tiles", tile)):
        folder = Path("instrument", name)
        folder.mkdir(parents=True, exist_ok=True)
        for split, count in SPLITS.items():
            np.save(folder / f"{split}.npy", np.stack([draw(random) for _ in range(count)]))
        print(f"{folder}: {SPLITS}")
