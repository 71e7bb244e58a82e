"""Scores against the bounds' definitions, in float64, for every family."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nvae.evaluation import RecordStore, evaluate
from nvae.models import HierarchicalVAE
from nvae.random import STREAM_POSTERIOR, STREAM_RATIO, fold_in, image_keys, latent_noise
from nvae.scores import ScoreRecords, log_likelihood_maps, score
from tests.models.small import small_model, small_very_deep
from tests.outside import two_groups


def _nvae(**changes):
    torch.manual_seed(0)
    model = small_model(image_size=8, preprocess_blocks=0, likelihood="logistic_mixture", bits=4,
                        **changes)  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


FAMILIES = {
    "nvae": _nvae,
    "nvae-flows": lambda: _nvae(num_flows=2),
    "vdvae": lambda: small_very_deep("vdvae"),
    "evdvae": lambda: small_very_deep("evdvae"),
    "outside": two_groups,
}


@pytest.fixture(params=FAMILIES)
def model(request) -> HierarchicalVAE:
    return FAMILIES[request.param]().double()


def images(model, n=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    levels = 2**model.config.bits
    shape = n, *model.config.image_shape
    return torch.randint(levels, shape, generator=generator).double() / (levels - 1)


def batches(x, size, labels=None):
    rows = torch.arange(len(x)).split(size)
    return [
        SimpleNamespace(x=x[i], index=i, labels=None if labels is None else labels[i]) for i in rows
    ]


def _noise(model, index, stream, draw, seed=0):
    keys = image_keys(torch.tensor([index]), seed=seed, stream=stream)
    return latent_noise(fold_in(keys, draw), model.latent_shapes, torch.float64)


def _padded(model, latents):
    return [*latents, *[None] * (model.num_groups - len(latents))]


@torch.no_grad()
def _bound(model, x, index, kept, draw, seed=0):
    """L^{>k} of one image and draw by its definition, group by group; ``kept`` is G - k."""
    own = _noise(model, index, STREAM_POSTERIOR, draw, seed)
    priors = _noise(model, index, STREAM_RATIO, draw, seed)
    encoder_maps, latents, kl = model.encode(x), [], 0.0
    for group in range(model.num_groups):
        if group < kept:
            # a posterior pass whose coarser latents are those so far
            _, groups = model.top_down(own, encoder_maps=encoder_maps)
            kl += groups[group].kl.sum()
        else:
            _, groups = model.top_down(priors, latents=_padded(model, latents))
        latents.append(groups[group].z)
    state, _ = model.top_down(own, latents=latents)
    return model.likelihood(model.decode_state(state)).log_prob(x) - kl


def test_partial_bounds_are_what_their_definition_says(model):
    """Which groups come from where, which KL counts, which noise is whose."""
    x = images(model)
    found = score(model, batches(x, 2), ratio_samples=2, seed=3).partial_bounds
    groups = model.num_groups
    assert found.shape == (3, groups + 1)
    for index in range(3):
        for k in range(groups + 1):
            draws = [_bound(model, x[[index]], index, groups - k, draw, seed=3) for draw in (0, 1)]
            assert found[index, k] == pytest.approx(sum(draws).item() / 2, rel=1e-9)


def test_with_every_group_from_the_posterior_it_is_the_elbo(model):
    x = images(model)
    found = score(model, batches(x, 3), elbo_samples=2, ratio_samples=2)
    assert found.partial_bounds[:, 0] == pytest.approx(-found.negative_elbo, rel=1e-12)
    assert found.ratios == pytest.approx(
        -found.negative_elbo[:, None] - found.partial_bounds[:, 1:], rel=1e-9, abs=1e-9
    )


def test_with_every_group_from_the_prior_no_kl_counts(model):
    """L^{>G} is the mean of log p(x | z) over the prior: no posterior enters it."""
    x = images(model)
    found = score(model, batches(x, 3), ratio_samples=2).partial_bounds[:, -1]
    for index in range(3):
        with torch.no_grad():
            logits = [
                model.decode_state(model.top_down(_noise(model, index, STREAM_RATIO, draw))[0])
                for draw in (0, 1)
            ]
        each = [model.likelihood(one).log_prob(x[[index]]).item() for one in logits]
        assert found[index] == pytest.approx(np.mean(each), rel=1e-12)


def test_bounds_are_those_of_the_evaluation(model):
    x = images(model, 5)
    settings = {"importance_samples": (2, 6), "elbo_samples": 3, "seed": 4}
    result = evaluate(model, batches(x, 5), **settings)
    found = score(model, batches(x, 5), **settings)
    assert found.negative_elbo.mean() == pytest.approx(result.negative_elbo.mean, rel=1e-12)
    assert found.kl_per_group.mean(0) == pytest.approx(result.kl_per_group, rel=1e-12)
    total = found.reconstruction + found.kl_per_group.sum(1)
    assert total == pytest.approx(found.negative_elbo, rel=1e-12)
    nll = [bound.nll.mean for bound in result.importance_weighted]
    assert -found.log_evidence.mean(0) == pytest.approx(nll, rel=1e-12)


def test_batches_and_chunks_change_no_number(model):
    x = images(model, 7)
    settings = {"importance_samples": (5,), "ratio_samples": 3, "seed": 1}
    one = score(model, batches(x, 7), chunk=1000, **settings)
    other = score(model, reversed(batches(x, 2)), chunk=4, **settings)
    for name in ("negative_elbo", "partial_bounds", "log_evidence"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-9)
    assert other.index.tolist() == list(range(7))
    different = score(model, batches(x, 7), **{**settings, "seed": 2})
    assert (different.partial_bounds != one.partial_bounds).all()


def test_maps_add_up_to_the_reconstruction(model):
    x = images(model)
    found = score(model, batches(x, 3), elbo_samples=2, seed=5)
    maps = log_likelihood_maps(model, x, torch.arange(3), elbo_samples=2, seed=5, chunk=4)
    assert maps.shape == (3, 8, 8)
    assert maps.sum((1, 2)).numpy() == pytest.approx(-found.reconstruction, rel=1e-12)


def test_maps_show_the_counted_window_and_all_channels():
    model = _nvae(counted_size=4, image_channels=3).double()
    x = images(model)
    maps = log_likelihood_maps(model, x, torch.arange(3))
    assert maps.shape == (3, 4, 4)
    found = score(model, batches(x, 3))
    assert maps.sum((1, 2)).numpy() == pytest.approx(-found.reconstruction, rel=1e-12)


def test_a_map_is_the_likelihood_of_each_pixel_in_its_place():
    """Not mirrored or turned: against one pass, pixel by pixel, and a pixel changed alone."""
    model = _nvae(image_channels=3).double()
    x, index = images(model, 1), torch.arange(1)
    output = model(x, _noise(model, 0, STREAM_POSTERIOR, 0))
    direct = model.likelihood(output.logits).pixel_log_prob(x).sum(1)
    (found,) = log_likelihood_maps(model, x, index)
    assert torch.allclose(found, direct[0], rtol=1e-12)
    odd = x.clone()
    odd[0, 1, 2, 5] = 1 - odd[0, 1, 2, 5]
    changed = model.likelihood(output.logits).pixel_log_prob(odd).sum(1) - direct
    assert changed[0].nonzero().tolist() == [[2, 5]]


def test_labels_are_not_told():
    """A score of p(x) must not depend on what the images are called."""
    model = _nvae(num_classes=4).double()
    x = images(model)
    one, other = (
        score(model, batches(x, 3, labels)).partial_bounds
        for labels in (None, torch.tensor([3, 1, 2]))
    )
    assert (one == other).all()


def test_a_killed_run_goes_on(tmp_path, model):
    x = images(model, 6)
    whole = score(model, batches(x, 2), importance_samples=(3,))
    folder = tmp_path / "partial"

    def broken_off():
        yield from batches(x, 2)[:2]
        raise KeyboardInterrupt

    store = RecordStore(folder, "a", kind=ScoreRecords)
    with pytest.raises(KeyboardInterrupt):
        score(model, broken_off(), importance_samples=(3,), store=store)
    again, rows = RecordStore(folder, "a", kind=ScoreRecords), []
    assert again.done == {0, 1, 2, 3}
    resumed = score(
        model, batches(x, 2), importance_samples=(3,), store=again, progress=rows.append
    )
    assert sum(rows) == 6 * (3 + model.num_groups + 1)
    assert (resumed.partial_bounds == whole.partial_bounds).all()


def test_records_of_another_kind_are_refused(tmp_path):
    """The likelihood's own records have no partial bounds; they must not pass for scores."""
    model = _nvae().double()
    x = images(model)
    evaluate(model, batches(x, 3), store=RecordStore(tmp_path, "a"))
    with pytest.raises(ValueError, match="cannot be read"):
        RecordStore(tmp_path, "a", kind=ScoreRecords)


def test_wrong_inputs_are_named():
    model = _nvae()
    with pytest.raises(ValueError, match="ratio_samples is 0; it must be at least 1"):
        score(model, batches(images(model).float(), 3), ratio_samples=0)
    with pytest.raises(ValueError, match="images have shape"):
        score(model, [SimpleNamespace(x=torch.zeros(1, 1, 9, 8), index=torch.arange(1))])
    with pytest.raises(ValueError, match="no images"):
        score(model, [])
