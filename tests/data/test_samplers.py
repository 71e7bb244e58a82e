"""What a step sees is the user's to say: the same images on any number of devices."""

from itertools import chain

import pytest

from nvae.data.samplers import Shard, TrainSampler, micro_batches_a_step

WORLDS = (1, 2, 3, 8, 24)


def _epoch(size, batch_size, world, global_batch, position=0):
    """Every rank's batches of an epoch, by rank, as lists."""
    samplers = [TrainSampler(size, batch_size, 0, Shard(r, world), global_batch)
                for r in range(world)]  # fmt: skip
    return samplers, [[b.tolist() for b in s.batches(1, position)] for s in samplers]


def _steps(samplers, ranks):
    """Images of each step: of all ranks, over its micro-batches."""
    k = len(samplers[0].micro_batches)
    together = [list(chain(*shares)) for shares in zip(*ranks, strict=True)]
    return [list(chain(*together[i : i + k])) for i in range(0, len(together), k)]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("batch_size", [2, 5, 64])
@pytest.mark.parametrize("global_batch", [100, 96])
def test_a_step_sees_the_same_images_on_any_number_of_devices(world, batch_size, global_batch):
    alone = _steps(*_epoch(1000, global_batch, 1, global_batch))
    samplers, ranks = _epoch(1000, batch_size, world, global_batch)
    assert _steps(samplers, ranks) == alone
    assert len(alone) == 1000 // global_batch
    k = len(samplers[0].micro_batches)
    assert k == micro_batches_a_step(global_batch, world, batch_size)
    assert {len(s) for s in samplers} == {len(r) for r in ranks} == {len(alone) * k}


@pytest.mark.parametrize(
    ("images", "world", "batch_size", "k"),
    [(256, 24, 32, 1), (400, 24, 400, 1), (256, 24, 4, 3), (400, 1, 400, 1), (7, 1, 2, 4)],
)
def test_uneven_shares_differ_by_one_image(images, world, batch_size, k):
    """And are no larger than the device takes; the micro-batches' sizes are known to every rank."""
    samplers, ranks = _epoch(3 * images, batch_size, world, images)
    assert micro_batches_a_step(images, world, batch_size) == k
    shares = [len(batch) for rank in ranks for batch in rank]
    assert max(shares) - min(shares) == (1 if images % (world * k) else 0)
    assert max(shares) <= batch_size
    for sampler in samplers:
        assert sampler.micro_batches == [sum(len(r[j]) for r in ranks) for j in range(k)]
        assert sum(sampler.micro_batches) == images


@pytest.mark.parametrize("over", [-1, 0, 1])
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize(("world", "batch_size", "global_batch"),
                         [(1, 8, None), (2, 4, None), (1, 8, 8), (2, 3, 8), (3, 2, 8)])  # fmt: skip
def test_a_set_around_a_multiple_of_the_batch(over, steps, world, batch_size, global_batch):
    """One image short of it a step is lost; one above it waits for the next epoch."""
    size = 8 * steps + over
    if size < 8:
        with pytest.raises(ValueError, match="needs 8 training images a step, but there are 7"):
            TrainSampler(size, batch_size, 0, Shard(0, world), global_batch)
        return
    samplers, ranks = _epoch(size, batch_size, world, global_batch)
    found = _steps(samplers, ranks)
    assert [len(step) for step in found] == [8] * (steps - (over < 0))
    seen = list(chain(*found))
    assert len(set(seen)) == len(seen)
    for sampler, rank in zip(samplers, ranks, strict=True):
        assert len(sampler) == len(rank)
    last = samplers[0].global_batch_size * len(found)
    assert samplers[0].remaining(last) == 0
    assert list(samplers[0].batches(1, last)) == []


@pytest.mark.parametrize("world", WORLDS)
def test_an_epoch_goes_on_with_other_devices(world):
    whole = _steps(*_epoch(1000, 100, 1, 100))
    samplers, ranks = _epoch(1000, 7, world, 100, position=300)
    assert _steps(samplers, ranks) == whole[3:]
    assert samplers[0].remaining(300) == len(ranks[0])


def test_a_global_batch_is_taken_as_it_is():
    """Where there are fewer images the user's batch is not quietly another one."""
    with pytest.raises(ValueError, match=r"data\.global_batch=64 needs 64 .* there are 50"):
        TrainSampler.fitting(50, 16, 0, Shard(0, 2), 64)


def test_no_device_goes_without_an_image():
    with pytest.raises(ValueError, match="leaves some of 24 devices without an image"):
        micro_batches_a_step(25, 24, 1)
