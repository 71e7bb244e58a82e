"""Gathering pixels: right rows, right windows."""

import pytest
import torch

from nvae.data.tables import DenseTable, RaggedTable


def ragged() -> tuple[RaggedTable, list[torch.Tensor]]:
    shapes = [(4, 9), (7, 4), (4, 4)]
    images = [torch.randint(0, 256, (h, w, 3), dtype=torch.uint8) for h, w in shapes]
    pixels = torch.cat([image.flatten() for image in images])
    offsets = [0, 4 * 9 * 3, 4 * 9 * 3 + 7 * 4 * 3]
    layout = torch.tensor([[o, h, w] for o, (h, w) in zip(offsets, shapes, strict=True)])
    return RaggedTable(pixels, layout, size=4, channels=3), images


def test_dense_gathers_rows_in_order():
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 2, 2, 1).contiguous()
    table = DenseTable(images)
    got = table.gather(torch.tensor([3, 0, 3]), epoch=1, seed=0)
    assert got[:, 0, 0, 0].tolist() == [3, 0, 3]
    assert table.shape == (2, 2, 1)


@pytest.mark.parametrize("bad", [torch.zeros(2, 2, 2, 1), torch.zeros(2, 2, 2, dtype=torch.uint8)])
def test_dense_refuses_other_arrays(bad):
    with pytest.raises(ValueError, match="uint8"):
        DenseTable(bad)


def test_ragged_evaluation_takes_the_centre():
    table, images = ragged()
    got = table.gather(torch.tensor([1, 0, 2]), epoch=None, seed=0)
    assert torch.equal(got[0], images[1][1:5])
    assert torch.equal(got[1], images[0][:, 2:6])
    assert torch.equal(got[2], images[2])


def test_ragged_training_takes_every_window_and_repeats_itself():
    table, images = ragged()
    index = torch.tensor([0])
    seen = set()
    for epoch in range(60):
        window = table.gather(index, epoch=epoch, seed=0)[0]
        assert torch.equal(window, table.gather(torch.tensor([2, 0]), epoch=epoch, seed=0)[1])
        seen.add(next(k for k in range(6) if torch.equal(window, images[0][:, k : k + 4])))
    assert seen == set(range(6))
