"""Two real processes over gloo against one: statistics, gradients, noise, evaluation."""

from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from nvae.data import DataConfig
from nvae.data.module import ImageDataModule
from nvae.elbo import elbo
from nvae.evaluation import RecordStore, evaluate
from nvae.models import MODELS, NVAE, ModelConfig
from nvae.objective import ObjectiveConfig, build_objective
from nvae.training.batch import TrainingNoise
from nvae.training.shared_statistics import SharedStatistics
from tests.training.ranks import run_ranks
from tests.training.runs import RECIPES

MODEL = ModelConfig(
    image_size=8, num_scales=2, groups_per_scale=2, preprocess_blocks=1, preprocess_cells=1,
    postprocess_cells=1, encoder_channels=6, decoder_channels=6, latent_channels=2,
    encoder_cells_per_group=1, decoder_cells_per_group=1, bits=1,
)  # fmt: skip
BATCH = 3


def _gradients(rank: int, world: int, total: int, family: str = "nvae") -> dict[str, Any]:
    """One float64 training pass over this rank's share of a global batch, gradients averaged."""
    torch.manual_seed(0)
    recipe = RECIPES[family]
    model = MODELS[family](recipe.get("model", MODEL)).double()
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(total, 1, 8, 8, generator=generator, dtype=torch.float64).round()
    noise = model.draw_noise(total, generator)
    if world > 1:
        SharedStatistics(model)
    mine = slice(rank * total // world, (rank + 1) * total // world)
    objective = build_objective(model, recipe.get("objective", ObjectiveConfig()))
    mine_noise = [eps[mine] for eps in noise]
    loss = objective(model, x[mine], mine_noise, step=9, total_steps=100)  # beta is 0.3 or so
    assert (loss.penalty is not None) == (family == "nvae")
    weight = (mine.stop - mine.start) * world / total  # as in NVAELightning.training_step
    (loss.data * weight + (loss.penalty or 0)).backward()
    result = {}
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        if world > 1:
            dist.all_reduce(p.grad)
            p.grad /= world
        result[name] = p.grad.numpy()
    result |= {name: b.numpy() for name, b in model.named_buffers() if "running" in name}
    return result


def test_two_ranks_equal_one_with_the_double_batch() -> None:
    """Synchronized statistics, KL balancing and gradients: 2 x B equals 1 x 2B in float64."""
    whole = _gradients(0, 1, 2 * BATCH)
    for half in run_ranks(_gradients, 2, 2 * BATCH):
        assert half.keys() == whole.keys()
        scale = max(np.abs(v).max() for v in whole.values())
        for name, value in whole.items():
            np.testing.assert_allclose(
                half[name], value, rtol=1e-8, atol=1e-12 * scale, err_msg=name
            )


@pytest.mark.parametrize(
    ("family", "world"), [("nvae", 2), ("nvae", 3), ("vdvae", 2), ("evdvae", 2)]
)
def test_ranks_with_unlike_shares_equal_one_with_all(family: str, world: int) -> None:
    """Seven images on two and three ranks: every mean over ranks counts images, not ranks."""
    whole = _gradients(0, 1, 7, family)
    scale = max(np.abs(v).max() for v in whole.values())
    for share in run_ranks(_gradients, world, 7, family):
        for name, value in whole.items():
            np.testing.assert_allclose(
                share[name], value, rtol=1e-8, atol=1e-12 * scale, err_msg=name
            )


def _is_free(rank: int, world: int) -> list[float]:
    """KL term of one group: an image of 8 nats on one rank, three of 2 on the other."""
    kl = torch.full((1, 1), 8.0) if rank == 0 else torch.full((3, 1), 2.0)
    output: Any = SimpleNamespace(kl_per_group=kl)
    return elbo(output, torch.zeros(len(kl)), free_bits=4.0).kl_term.tolist()


def test_free_bits_count_images_not_ranks() -> None:
    """The mean of the four images is 3.5 nats, below the 4 that are free; that of the ranks 5."""
    assert run_ranks(_is_free, 2) == [[4.0], [4.0] * 3]


def test_statistics_are_this_ranks_own_without_a_group() -> None:
    """The comparison above would fail without synchronization: it can fail."""
    whole, half = _gradients(0, 1, 2 * BATCH), _gradients(0, 1, BATCH)
    assert any(not np.allclose(half[name], whole[name]) for name in whole)


def test_noise_differs_between_ranks_and_batches_and_repeats() -> None:
    """Equal noise on all ranks would correlate their gradients."""
    model = NVAE(MODEL)
    draws = {
        (seed, rank, batch): TrainingNoise(seed, rank)(model, 2, batch)[0]
        for seed in (0, 1)
        for rank in (0, 1)
        for batch in (0, 1)
    }
    keys = list(draws)
    for i, a in enumerate(keys):
        assert torch.equal(draws[a], TrainingNoise(a[0], a[1])(model, 2, a[2])[0])
        for b in keys[i + 1 :]:
            assert not torch.equal(draws[a], draws[b]), (a, b)


def test_noise_does_not_touch_the_global_generator() -> None:
    """Nor depend on it: an extra draw elsewhere must not change training."""
    model, noise = NVAE(MODEL), TrainingNoise(0)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = noise(model, 2, 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert all(torch.equal(a, b) for a, b in zip(first, noise(model, 2, 3), strict=True))


def _evaluation(rank: int, world: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = NVAE(MODEL).eval()
    data = ImageDataModule(
        DataConfig(
            name="odd", format="random", image_size=8, channels=1, bits=1,
            likelihood="bernoulli", train_size=4, test_size=13, valid_size=0,
        )
    )  # fmt: skip
    data.prepare_data()
    data.setup()
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=rank,
        world_size=world,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    with TemporaryDirectory() as folder:
        store = RecordStore(Path(folder), "test", rank)
        result = evaluate(
            model,
            map(data.to_input, data.eval_dataloader("test")),  # this rank's share
            importance_samples=(5,),
            store=store,
            distributed=world > 1,
        )
        own = store.records
    assert own is not None
    by_image = np.column_stack(
        [own.reconstruction, own.kl_per_channel.sum((1, 2)), own.log_evidence]
    )
    return {**result.to_dict(), "by_image": dict(zip(own.index.tolist(), by_image, strict=True))}


def test_evaluation_of_an_odd_set_is_the_same_on_one_and_two_ranks() -> None:
    """13 images: no padding, no double counting, noise by image."""
    (one,) = run_ranks(_evaluation, 1)
    both = run_ranks(_evaluation, 2)
    shares = [two["by_image"] for two in both]
    assert not shares[0].keys() & shares[1].keys()
    assert shares[0].keys() | shares[1].keys() == one["by_image"].keys() == set(range(13))
    for share in shares:
        for index, values in share.items():
            np.testing.assert_allclose(values, one["by_image"][index], rtol=1e-6)
    for two in both:
        assert two["images"] == one["images"] == 13
        for path in (
            ("negative_elbo", "mean"),
            ("negative_elbo", "standard_error"),
            ("importance_weighted", 0, "nll", "mean"),
        ):
            a: Any = one
            b: Any = two
            for key in path:
                a, b = a[key], b[key]
            assert b == pytest.approx(a, rel=1e-6), path
