"""Splits, orders and loaders: the right pixels; complete, disjoint over ranks, the same whatever
the threads, resumable."""

import itertools

import pytest
import torch

from nvae.data.loader import (
    DenseSplit,
    EvalLoader,
    RaggedSplit,
    TrainLoader,
)
from nvae.data.module import ImageDataModule
from nvae.data.samplers import EvalSampler, Shard, TrainSampler

N = 50


class SlowSplit(DenseSplit):
    """Finishes batches out of order, and may fail."""

    fail_at = -1

    def gather(self, index, *, epoch, seed):
        if self.fail_at in index.tolist():
            raise OSError("disk gone")
        torch.randn(int(index[0]) * 2000 + 1).sum()
        return super().gather(index, epoch=epoch, seed=seed)


def train_split(cls=DenseSplit):
    numbers = torch.arange(N, dtype=torch.uint8).view(N, 1, 1, 1)
    return cls(numbers.expand(N, 2, 2, 1).contiguous())


def train_loader(workers=0, *, cls=DenseSplit, index_only=False, seed=0, shard=None):
    sampler = TrainSampler(N, 8, seed, shard or Shard())
    return TrainLoader(
        sampler,
        train_split(cls),
        "train",
        seed=seed,
        num_workers=workers,
        index_only=index_only,
        pin_memory=False,
    )


def indices(batches):
    return [batch.indices.tolist() for batch in batches]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_threads_change_nothing(workers):
    one, many = train_loader(0), train_loader(workers, cls=SlowSplit)
    for _ in range(2):
        for a, b in zip(one, many, strict=True):
            assert torch.equal(a.indices, b.indices)
            assert torch.equal(a.images, b.images)
            assert torch.equal(b.images[:, 0, 0, 0], b.indices.to(torch.uint8))
            assert a.epoch == b.epoch


def test_an_error_in_a_thread_reaches_the_caller():
    loader = train_loader(2, cls=SlowSplit)
    loader.images.__dict__["fail_at"] = 17
    with pytest.raises(OSError, match="disk gone"):
        list(loader)


def test_an_abandoned_iteration_leaves_no_threads():
    import threading

    before = threading.active_count()
    iterator = iter(train_loader(3))
    next(iterator)
    iterator.close()
    assert threading.active_count() == before


def test_epochs_follow_each_other_and_differ():
    loader = train_loader()
    first, second = list(loader), list(loader)
    assert [batch.epoch for batch in first] == [0] * 6
    assert [batch.epoch for batch in second] == [1] * 6
    assert indices(first) != indices(second)


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("read", [0, 1, 4, 6])
def test_resume_in_the_middle_is_exact_despite_reading_ahead(workers, read):
    loader = train_loader(workers)
    list(loader)
    iterator = iter(loader)
    for _ in range(read):
        next(iterator)
    state = loader.state_dict()
    rest = indices(iterator)
    fresh = train_loader(workers)
    fresh.load_state_dict(state)
    assert len(fresh) == 6
    assert indices(fresh) == rest
    assert indices(fresh) == indices(loader)


def test_set_epoch_keeps_the_place_in_its_own_epoch_only():
    """Lightning names the epoch after it has restored the state, also when resuming within it."""
    loader = train_loader()
    whole = indices(loader)
    resumed = train_loader()
    resumed.load_state_dict({"epoch": 0, "position": 16, "size": N, "seed": 0})
    iterator = iter(resumed)
    resumed.sampler.set_epoch(0)
    assert indices(iterator) == whole[2:]
    resumed.load_state_dict({"epoch": 0, "position": 48, "size": N, "seed": 0})
    resumed.sampler.set_epoch(1)
    assert indices(resumed) == indices(loader)


@pytest.mark.parametrize("key", ["size", "seed"])
def test_a_state_of_other_data_is_refused(key):
    loader = train_loader()
    with pytest.raises(ValueError, match=f"made with {key} 3 of the training data"):
        loader.load_state_dict(loader.state_dict() | {key: 3})


def test_index_only_carries_no_pixels():
    batch = next(iter(train_loader(2, index_only=True)))
    assert batch.images is None
    assert len(batch.indices) == 8


def test_evaluation_is_the_same_every_time():
    loader = EvalLoader(
        EvalSampler(N, 8),
        train_split(),
        "test",
        seed=0,
        num_workers=2,
        index_only=False,
        pin_memory=False,
    )
    assert len(loader) == 7
    assert indices(loader) == indices(loader)
    assert list(itertools.chain(*indices(loader))) == list(range(N))
    assert {batch.epoch for batch in loader} == {None}


@pytest.mark.parametrize("key", ["epoch", "position", "size", "seed"])
@pytest.mark.parametrize("value", [None, -1, 1.0, "1", 2**63, True, []])
def test_a_state_of_the_wrong_kind_is_one_line(make_config, key, value):
    module = ImageDataModule(make_config())
    module.setup()
    loader = module.train_dataloader()
    state = {**loader.state_dict(), key: value}
    for bad in (state, {k: v for k, v in state.items() if k != key}, None, [state]):
        with pytest.raises(ValueError, match="the checkpoint's state of the training data has no"):
            loader.load_state_dict(bad)


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


def ragged() -> tuple[RaggedSplit, list[torch.Tensor]]:
    shapes = [(4, 9), (7, 4), (4, 4)]
    images = [torch.randint(0, 256, (h, w, 3), dtype=torch.uint8) for h, w in shapes]
    pixels = torch.cat([image.flatten() for image in images])
    offsets = [0, 4 * 9 * 3, 4 * 9 * 3 + 7 * 4 * 3]
    layout = torch.tensor([[o, h, w] for o, (h, w) in zip(offsets, shapes, strict=True)])
    return RaggedSplit(pixels, layout, window=(4, 4), channels=3), images


def test_dense_gathers_rows_in_order():
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 2, 2, 1).contiguous()
    split = DenseSplit(images)
    got = split.gather(torch.tensor([3, 0, 3]), epoch=1, seed=0)
    assert got[:, 0, 0, 0].tolist() == [3, 0, 3]
    assert split.shape == (2, 2, 1)


@pytest.mark.parametrize(
    "bad", [torch.zeros(2, 2, 2, 1).double(), torch.zeros(2, 2, 2, dtype=torch.uint8)]
)
def test_dense_refuses_other_arrays(bad):
    with pytest.raises(ValueError, match="uint8"):
        DenseSplit(bad)


def test_ragged_evaluation_takes_the_center():
    split, images = ragged()
    got = split.gather(torch.tensor([1, 0, 2]), epoch=None, seed=0)
    assert torch.equal(got[0], images[1][1:5])
    assert torch.equal(got[1], images[0][:, 2:6])
    assert torch.equal(got[2], images[2])


def test_ragged_training_takes_every_window_and_repeats_itself():
    split, images = ragged()
    index = torch.tensor([0])
    seen = set()
    for epoch in range(60):
        window = split.gather(index, epoch=epoch, seed=0)[0]
        assert torch.equal(window, split.gather(torch.tensor([2, 0]), epoch=epoch, seed=0)[1])
        seen.add(next(k for k in range(6) if torch.equal(window, images[0][:, k : k + 4])))
    assert seen == set(range(6))
