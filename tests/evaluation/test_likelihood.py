"""The bounds against a linear-Gaussian model whose evidence is known in closed form."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nvae.evaluation import BoundSettings, RecordStore, evaluate
from nvae.evaluation.likelihood import LogWeights, bound_images
from nvae.models import NVAE, ModelConfig

from .linear_gaussian import LinearGaussian


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(40, 1, 2, 2, generator=generator, dtype=torch.float64)


def batches(x, size, order=None):
    index = torch.arange(len(x)) if order is None else order
    return [SimpleNamespace(x=x[i], index=i) for i in index.split(size)]


def test_exact_posterior_gives_the_evidence_with_one_draw(images):
    """With q = p(z | x) every weight is p(x): any error in log_q, log_p or log_prob shows."""
    model = LinearGaussian().make_orthogonal()
    result = evaluate(model, batches(images, 7), importance_samples=(1, 5))
    evidence = model.log_evidence(images)
    for bound in result.importance_weighted:
        assert bound.nll.mean == pytest.approx(-evidence.mean().item(), rel=1e-12)
        assert bound.effective_samples == pytest.approx(bound.samples, rel=1e-9)
        spread = evidence.std().item() / len(images) ** 0.5
        assert bound.nll.standard_error == pytest.approx(spread, rel=1e-9)
        assert bound.bits_per_dim.mean == pytest.approx(
            -evidence.mean().item() / np.log(2) / 4, rel=1e-12
        )


def test_bound_tightens_with_more_draws_and_reaches_the_evidence(images):
    model = LinearGaussian(widening=1.6)
    result = evaluate(
        model, batches(images, 40), importance_samples=(1, 10, 100, 3000), elbo_samples=400
    )
    nll = [bound.nll.mean for bound in result.importance_weighted]
    evidence = -model.log_evidence(images).mean().item()
    assert nll[0] > nll[1] > nll[2] > evidence - 0.01
    assert nll[3] == pytest.approx(evidence, abs=0.01)
    assert nll[0] > evidence + 0.2  # the first bound is visibly loose, or the test proves nothing
    assert result.negative_elbo.mean == pytest.approx(
        model.negative_elbo(images).mean().item(), abs=0.05
    )
    assert result.negative_elbo.mean == pytest.approx(
        result.reconstruction.mean + result.kl.mean, rel=1e-12
    )
    assert sum(result.kl_per_group) == pytest.approx(result.kl.mean, rel=1e-12)
    sizes = [bound.effective_samples / bound.samples for bound in result.importance_weighted]
    assert sizes[0] == pytest.approx(1)
    assert all(0.05 < size < 0.95 for size in sizes[1:])


def test_batches_order_and_chunks_do_not_change_a_number(images):
    model = LinearGaussian(widening=1.5)
    settings = {"importance_samples": (1, 7, 30), "elbo_samples": 3, "seed": 5}
    reference = evaluate(model, batches(images, 40), chunk=64, **settings).to_dict()
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    for size, chunk, order in ((1, 1, None), (13, 1000, shuffled), (40, 7, shuffled)):
        other = evaluate(model, batches(images, size, order), chunk=chunk, **settings).to_dict()
        assert _flat(other) == pytest.approx(_flat(reference), rel=1e-12)
    different = evaluate(model, batches(images, 40), **{**settings, "seed": 6})
    assert different.negative_elbo.mean != reference["negative_elbo"]["mean"]


def _flat(value):
    if isinstance(value, dict):
        return [x for entry in value.values() for x in _flat(entry)]
    if isinstance(value, list | tuple):
        return [x for entry in value for x in _flat(entry)]
    return [] if isinstance(value, str) else [float(value)]


def test_memory_is_bounded_and_images_are_encoded_once(images):
    model = LinearGaussian()
    evaluate(model, batches(images, 40), importance_samples=(100,), chunk=16)
    assert max(model.rows) <= 16
    assert model.encoded == 40
    assert sum(model.rows) == 4000


def test_progress_adds_up_to_all_draws(images):
    done = []
    evaluate(LinearGaussian(), batches(images, 9), importance_samples=(20,), progress=done.append)
    assert sum(done) == 40 * 20


def test_small_k_does_not_depend_on_the_largest_k(images):
    """All K share their draws: K = 5 is the same number whether or not K = 50 is asked too."""
    model = LinearGaussian(widening=1.5)
    one = evaluate(model, batches(images, 40), importance_samples=(5,))
    both = evaluate(model, batches(images, 40), importance_samples=(50, 5))
    assert both.importance_weighted[0].nll.mean == pytest.approx(
        one.importance_weighted[0].nll.mean, rel=1e-12
    )
    assert both.negative_elbo.mean == pytest.approx(one.negative_elbo.mean, rel=1e-12)


def test_running_sums_match_direct_ones_where_float32_overflows():
    log_weight = torch.tensor([[-5000.0, -5001, -4990, -5003], [800, 801, 802, 790]])
    running = LogWeights(2)
    running.add(log_weight[:, :1])
    running.add(log_weight[:, 1:])
    w = log_weight.double()
    assert torch.allclose(running.log_mean, w.logsumexp(1) - np.log(4), rtol=1e-14)
    share = torch.softmax(w, 1)
    assert torch.allclose(running.effective_samples, 1 / (share**2).sum(1), rtol=1e-10)


def test_a_killed_evaluation_goes_on_where_it_stopped(images, tmp_path):
    model = LinearGaussian(widening=1.5)
    whole = evaluate(model, batches(images, 8), importance_samples=(9,)).to_dict()

    def broken_off():
        yield from batches(images, 8)[:3]
        raise KeyboardInterrupt

    path = tmp_path / "partial"
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, broken_off(), importance_samples=(9,), store=RecordStore(path, "a"))
    model.encoded = 0
    done = []
    resumed = evaluate(
        model, batches(images, 8), importance_samples=(9,), store=RecordStore(path, "a"),
        progress=done.append,
    )  # fmt: skip
    assert model.encoded == 16
    assert sum(done) == 40 * 9
    assert _flat(resumed.to_dict()) == pytest.approx(_flat(whole), rel=1e-12)
    with pytest.raises(ValueError, match="other settings"):
        RecordStore(path, "b")
    file = path / "rank0.npz"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        RecordStore(path, "a")


def test_another_process_s_records_are_not_computed_again(images, tmp_path):
    """Going on with another number of processes must lose and repeat nothing."""
    model = LinearGaussian(widening=1.5)
    whole = evaluate(model, batches(images, 8)).to_dict()
    evaluate(model, batches(images, 8)[:2], store=RecordStore(tmp_path, "a", rank=1))
    model.encoded = 0
    resumed = evaluate(model, batches(images, 8), store=RecordStore(tmp_path, "a", rank=0))
    assert model.encoded == 24
    assert _flat(resumed.to_dict()) == pytest.approx(_flat(whole), rel=1e-12)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["rank0.npz", "rank1.npz"]


def _rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    x = torch.randn(5, 1, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    index = torch.arange(5)[rank::3] if rank < 2 else torch.arange(0)
    share = [SimpleNamespace(x=x[index], index=index)]
    result = evaluate(
        LinearGaussian(widening=1.5), share, importance_samples=(4,), distributed=True
    )
    torch.save(_flat(result.to_dict()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_with_unequal_shares_or_none_get_what_one_process_gets(tmp_path):
    """Ranks weigh by their images, and one without any must not hang the others."""
    mp.spawn(_rank, (str(tmp_path),), nprocs=3)
    x = torch.randn(5, 1, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    seen = torch.tensor([0, 3, 1, 4])  # the third rank's share was empty
    alone = evaluate(
        LinearGaussian(widening=1.5), [SimpleNamespace(x=x[seen], index=seen)],
        importance_samples=(4,),
    )  # fmt: skip
    for rank in range(3):
        pooled = torch.load(tmp_path / f"{rank}.pt")
        assert pooled == pytest.approx(_flat(alone.to_dict()), rel=1e-12)


def test_a_number_that_is_not_finite_is_named(images):
    images[17] = torch.nan
    with pytest.raises(FloatingPointError, match="image 17 "):
        evaluate(LinearGaussian(), batches(images, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"importance_samples": (0, 5)}, "every K"),
        ({"elbo_samples": 0}, "elbo_samples"),
        ({"chunk": 0}, "chunk"),
    ],
)
def test_impossible_settings_are_refused(images, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate(LinearGaussian(), batches(images, 8), **arguments)


def test_no_images_and_wrong_sizes_are_refused(images):
    with pytest.raises(ValueError, match="no images"):
        evaluate(LinearGaussian(), [])
    with pytest.raises(ValueError, match="wrong size"):
        evaluate(LinearGaussian(), batches(torch.zeros(2, 1, 3, 3, dtype=torch.float64), 2))


def _tiny_nvae(flows=0):
    torch.manual_seed(0)
    config = ModelConfig(
        image_size=8, num_scales=2, groups_per_scale=2, latent_channels=2, encoder_channels=4,
        decoder_channels=4, preprocess_blocks=1, preprocess_cells=1, postprocess_cells=1,
        encoder_cells_per_group=1, decoder_cells_per_group=1, num_flows=flows,
    )  # fmt: skip
    return NVAE(config).double()


@pytest.mark.parametrize("flows", [0, 1])
def test_network_gives_what_its_own_forward_pass_gives(flows):
    """Chunked decoding of repeated encoder maps must be the model's forward pass, draw by draw."""
    from nvae.random import STREAM_POSTERIOR, fold_in, image_keys, latent_noise

    model = _tiny_nvae(flows).eval()
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64).round()
    index = torch.tensor([4, 9, 2])
    settings = BoundSettings((3,), elbo_samples=2, seed=7, chunk=4)
    records = bound_images(model, x, index, settings)
    keys = image_keys(index, seed=7, stream=STREAM_POSTERIOR)
    log_weight, reconstruction, kl = [], [], []
    with torch.no_grad():
        for draw in range(3):
            noise = latent_noise(fold_in(keys, draw), model.latent_shapes, x.dtype)
            output = model(x, noise)
            log_likelihood = model.likelihood(output.logits).log_prob(x)
            log_weight.append(log_likelihood + output.log_p - output.log_q)
            reconstruction.append(-log_likelihood)
            kl.append(torch.stack(output.kl_per_channel, 1))
    expected = torch.stack(log_weight).logsumexp(0) - np.log(3)
    assert torch.allclose(torch.from_numpy(records.log_evidence[:, 0]), expected, rtol=1e-10)
    expected = torch.stack(reconstruction[:2]).mean(0)
    assert torch.allclose(torch.from_numpy(records.reconstruction), expected, rtol=1e-10)
    expected = torch.stack(kl[:2]).mean(0)
    assert torch.allclose(torch.from_numpy(records.kl_per_channel), expected, rtol=1e-9)


def test_the_model_is_left_in_its_mode(images):
    model = _tiny_nvae()
    model.encoder.eval()
    x = torch.zeros(2, 1, 8, 8, dtype=torch.float64)
    evaluate(model, batches(x, 2))
    assert model.training
    assert not model.encoder.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_refused(dtype):
    """Their own type would round the pixels whose likelihood is asked for."""
    x = torch.zeros(2, 1, 8, 8)
    with pytest.raises(ValueError, match=r"model\.float\(\)"):
        evaluate(_tiny_nvae().to(dtype), batches(x, 2))
    assert evaluate(_tiny_nvae().float(), batches(x, 2)).images == 2


def test_active_units_counts_channels_above_the_threshold():
    from nvae.evaluation.result import ImageRecords, summarize

    kl = np.zeros((4, 2, 3))
    kl[:, 0, 0] = 0.5
    kl[:, 0, 1] = [0.4, 0, 0, 0]  # mean exactly 0.1: not above
    kl[:, 1] = 0.2
    records = ImageRecords(np.arange(4), np.zeros(4), kl, np.zeros((4, 0)), np.zeros((4, 0)))
    model = SimpleNamespace(
        config=SimpleNamespace(counted_pixels=4, pixel_distribution=SimpleNamespace(density_of="")),
        latent_shapes=((3, 1, 1),) * 2,
    )
    result = summarize(records, model, ())
    assert result.active_units == (1, 3)
    assert result.kl_per_group == pytest.approx((0.6, 0.6))
    assert "1 of 3" in result.table()
