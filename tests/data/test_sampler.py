"""Orders: complete, disjoint over ranks, independent of the number of ranks, resumable."""

import pytest
import torch

from nvae.data.sampler import EvalSampler, Shard, TrainSampler


def as_lists(batches):
    return [batch.tolist() for batch in batches]


def test_an_epoch_reads_no_image_twice_and_drops_the_rest():
    sampler = TrainSampler(size=50, batch_size=8, seed=0)
    batches = as_lists(sampler.batches(0))
    assert len(batches) == len(sampler) == 6
    assert {len(b) for b in batches} == {8}
    assert len({i for b in batches for i in b}) == 48


def test_order_depends_on_seed_and_epoch():
    def order(seed, epoch):
        return as_lists(TrainSampler(50, 8, seed).batches(epoch))

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_two_ranks_read_together_what_one_rank_reads_alone():
    """The global batch must not depend on how many devices share it."""
    alone = as_lists(TrainSampler(50, 8, 0).batches(3))
    ranks = [as_lists(TrainSampler(50, 4, 0, Shard(r, 2)).batches(3)) for r in range(2)]
    together = [a + b for a, b in zip(*ranks, strict=True)]
    assert together == alone


def test_resume_continues_the_same_order_also_with_other_ranks():
    whole = as_lists(TrainSampler(50, 8, 0).batches(1))
    rest = as_lists(TrainSampler(50, 8, 0).batches(1, position=16))
    assert rest == whole[2:]
    ranks = [
        as_lists(TrainSampler(50, 4, 0, Shard(r, 2)).batches(1, position=16)) for r in range(2)
    ]
    assert [a + b for a, b in zip(*ranks, strict=True)] == whole[2:]


def test_too_few_images_for_a_batch_is_refused():
    with pytest.raises(ValueError, match="needs 64 training images a step, but there are 50"):
        TrainSampler(50, 32, 0, Shard(0, 2))


@pytest.mark.parametrize(("size", "world", "batch"), [(9, 1, 9), (9, 2, 4), (2, 2, 1), (70, 2, 16)])
def test_a_batch_is_as_large_as_the_images_allow(size, world, batch):
    """Ranks alike, or one would wait for the others."""
    ranks = [TrainSampler.fitting(size, 16, 0, Shard(r, world)) for r in range(world)]
    assert {sampler.batch_size for sampler in ranks} == {batch}
    epoch = [as_lists(sampler.batches(0)) for sampler in ranks]
    assert {len(batches) for batches in epoch} == {size // (batch * world)}
    seen = [i for batches in epoch for one in batches for i in one]
    assert len(set(seen)) == len(seen)


def test_fewer_images_than_devices_are_refused():
    with pytest.raises(ValueError, match=r"there are 2: set trainer\.devices=2"):
        TrainSampler.fitting(2, 16, 0, Shard(0, 3))


@pytest.mark.parametrize("size", [1, 7, 8, 9, 20])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_reads_every_image_once(size, world):
    """Padding or repeating an image would bias the test likelihood."""
    seen = []
    for rank in range(world):
        sampler = EvalSampler(size, 4, Shard(rank, world))
        batches = list(sampler.batches())
        assert len(batches) == len(sampler)
        seen += [i for batch in batches for i in batch.tolist()]
    assert sorted(seen) == list(range(size))


def test_evaluation_is_in_order():
    assert torch.equal(torch.cat(list(EvalSampler(10, 3).batches())), torch.arange(10))


def test_a_rank_outside_the_world_is_refused():
    with pytest.raises(ValueError, match="rank is 2"):
        Shard(2, 2)
