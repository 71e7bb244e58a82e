"""Memory accesses of the depthwise kernels on the presets' main shapes, read off their warps."""

import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nvae.ops import kernels
from nvae.ops.cuda import Launch

from .accesses import LoggingLauncher, Site
from .host import H100

BFLOAT = torch.bfloat16
SHAPES = [
    ((4, 1536, 16, 16), BFLOAT),  # CIFAR-10; fewer images, whose number no tile depends on
    ((2, 768, 32, 32), BFLOAT),  # CelebA 64
    ((16, 3072, 8, 8), BFLOAT),
    ((1, 360, 64, 64), BFLOAT),  # FFHQ 256
    ((1, 90, 64, 64), BFLOAT),  # two channels an access
    ((200, 96, 4, 4), torch.float32),  # MNIST
]


def run(shape: tuple[int, ...], dtype: torch.dtype, folder: Path) -> LoggingLauncher:
    """A forward and a backward pass of the fused chain; its first blocks are recorded."""
    launcher = LoggingLauncher(folder, limits=H100)
    gen = torch.Generator().manual_seed(0)
    b, c, h, w = shape

    def image() -> Tensor:
        return torch.randn(b, h, w, c, generator=gen).to(dtype).permute(0, 3, 1, 2)

    x, weight = image(), torch.randn(c, 1, 5, 5, generator=gen)
    bn = (torch.ones(c), torch.zeros(c), torch.ones(3, c).double())
    kernels.depthwise_forward(x, weight, 1, bn, True, launcher=launcher)
    through = (image(), torch.zeros(2, c).double())
    kernels.depthwise_backward(image(), x, weight, 1, bn, through, launcher=launcher)
    return launcher


def once_a_block(site: Site) -> bool:
    """Transposes of a block's weights or their gradients through shared memory."""
    return "WEIGHT_PITCH" in site.line or site.line == "float total = *first;"


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "dtype"), SHAPES, ids=str)
def test_shared_memory_has_no_bank_conflicts(
    shape: tuple[int, ...], dtype: torch.dtype, host_folder: Path
) -> None:
    sites = run(shape, dtype, host_folder).sites
    for kernel in KERNELS:
        shared = [site for site in sites[kernel] if site.tensor is None]
        assert any(site.is_store and site.size == 16 for site in shared) or shape[1] == 90
        for site in shared:
            assert site.degree <= (2 if once_a_block(site) else 1), (kernel, site)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "dtype"), SHAPES, ids=str)
def test_images_are_moved_by_whole_sectors(
    shape: tuple[int, ...], dtype: torch.dtype, host_folder: Path
) -> None:
    """Where pixels are aligned to sectors, a warp asks for no byte that it does not use, and reads
    only the tile with its halo, once."""
    launcher = run(shape, dtype, host_folder)
    for kernel, images in KERNELS.items():
        launch = next(x for x in launcher.launches if x.kernel == kernel)
        macros = dict(launch.macros)
        for site in launcher.sites[kernel]:
            if site.tensor in images and shape[1] * dtype.itemsize % 32 == 0:
                assert site.sectors * 32 == site.needed, (kernel, site)
        for tensor, has_halo in images.items():
            moved = sum(s.needed for s in launcher.sites[kernel] if s.tensor == tensor)
            halo = macros["K"] - 1 if has_halo else 0
            rows = min(macros["TH"] + halo, shape[2])
            columns = min(macros["TW"] + halo, shape[3])
            unit = macros["NB"] * rows * columns * macros["CB"] * dtype.itemsize
            units = units_of(launch, launcher.most_blocks)
            assert 0 < moved <= unit * units, (kernel, tensor)


KERNELS = {
    # argument: whether it is read with its halo
    "depthwise_forward": {0: True, 5: False},
    "depthwise_backward": {0: True, 1: True, 3: False, 8: False},
}


def units_of(launch: Launch, blocks: int) -> int:
    """Units that the first blocks walk over."""
    # eps, repeats and momentum stand before them forward, the number of elements backward
    start = 20 if launch.kernel == "depthwise_forward" else 8
    _, units, rows = struct.unpack_from("3i", launch.scalars, start)
    columns = launch.blocks // rows
    return sum(
        -(-(units - block // columns) // rows) for block in range(min(blocks, launch.blocks))
    )


def test_a_conflict_is_seen(host_folder: Path) -> None:
    """Lanes 32 bytes apart meet in half of the banks; the log must say so."""

    def edit(kernel: str, source: str) -> str:
        return source.replace("return position % HALF / 4 * 8", "return position; //").replace(
            "to + vector * 4 + HALF - first", "to + vector * 8 + 4"
        ).replace("to + vector * 4 + first", "to + vector * 8")  # fmt: skip

    launcher = LoggingLauncher(host_folder, limits=H100, edit=edit)
    x = torch.zeros(1, 16, 16, 64, dtype=BFLOAT).permute(0, 3, 1, 2)
    kernels.depthwise_forward(x, torch.zeros(64, 1, 5, 5), 1, launcher=launcher)
    stores = [
        site
        for site in launcher.sites["depthwise_forward"]
        if site.tensor is None and site.is_store and site.size == 16 and "vector" in site.line
    ]
    assert stores
    assert all(site.degree == 2 for site in stores)
