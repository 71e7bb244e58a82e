"""Distances against closed forms and brute force, on small features."""

import numpy as np
import pytest
import torch

from nvae.evaluation.distances import (
    DistanceSettings,
    check_possible,
    distances,
    frechet_distance,
    prdc,
)
from nvae.evaluation.features import FeatureMoments, FeatureSet


def _moments(features, batch=17):
    moments = FeatureMoments.empty(features.shape[1])
    for part in features.split(batch):
        moments.add(part)
    return moments


def _set(features, logits=None):
    return FeatureSet(_moments(features), features, logits)


def _normal(n, d, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=dtype)


def test_moments_are_mean_and_unbiased_covariance_whatever_the_batches():
    x = _normal(101, 4, 0).double() * torch.tensor([1.0, 10, 0.1, 3]) + 5
    for batch in (1, 17, 101):
        moments = _moments(x, batch)
        assert np.allclose(moments.mean, x.mean(0), rtol=1e-12)
        assert np.allclose(moments.covariance, np.cov(x.numpy(), rowvar=False), rtol=1e-10)


def test_a_single_image_has_no_covariance():
    with pytest.raises(ValueError, match="at least 2"):
        _ = _moments(torch.ones(1, 3)).covariance


def _exact_moments(mean, covariance, n=1000):
    """Sufficient statistics that have exactly this mean and covariance."""
    mean = torch.as_tensor(mean, dtype=torch.float64)
    covariance = torch.as_tensor(covariance, dtype=torch.float64)
    outer = (n - 1) * covariance + n * torch.outer(mean, mean)
    return FeatureMoments(n, n * mean, outer)


def test_frechet_distance_of_gaussians_in_closed_form():
    """Diagonal: sum (m1 - m2)^2 + (s1 - s2)^2. Equal covariances: the distance of the means."""
    a = _exact_moments([0.0, 1, 2], np.diag([1.0, 4, 9]))
    b = _exact_moments([1.0, 1, 0], np.diag([4.0, 4, 0.25]))
    expected = 1 + 4 + (1 - 2) ** 2 + (3 - 0.5) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)


def test_frechet_distance_of_covariances_that_do_not_commute():
    """Tr (S1 S2)^(1/2) by the symmetric square root, which another algorithm finds."""
    rng = np.random.default_rng(0)
    roots = [rng.normal(size=(5, 5)) for _ in range(2)]
    s1, s2 = (r @ r.T + 0.1 * np.eye(5) for r in roots)
    values, vectors = np.linalg.eigh(s1)
    half = vectors @ np.diag(values**0.5) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(half @ s2 @ half)).sum()
    expected = np.trace(s1) + np.trace(s2) - 2 * cross
    found = frechet_distance(_exact_moments(np.zeros(5), s1), _exact_moments(np.zeros(5), s2))
    assert found == pytest.approx(expected, rel=1e-9)


def test_fid_of_samples_approaches_the_distance_of_their_distributions():
    real, generated = _normal(40000, 3, 0), 1.5 * _normal(40000, 3, 1) + 0.5
    found = distances(["fid"], _set(real), _set(generated))
    assert found["fid"] == pytest.approx(3 * (0.25 + 0.25), rel=0.03)


def test_kid_is_the_unbiased_polynomial_mmd():
    """One subset of everything: the estimator of Binkowski et al., written out by hand."""
    real, generated = _normal(30, 4, 0), _normal(30, 4, 1) + 0.3
    settings = DistanceSettings(kid_subsets=1, kid_subset_size=30)
    found = distances(["kid"], _set(real), _set(generated), settings)

    def kernel(a, b):
        return (a.double() @ b.double().T / 4 + 1) ** 3

    def off_diagonal_mean(k):
        return (k.sum() - k.diagonal().sum()) / (30 * 29)

    expected = (
        off_diagonal_mean(kernel(real, real))
        + off_diagonal_mean(kernel(generated, generated))
        - 2 * kernel(real, generated).mean()
    )
    assert found["kid"] == pytest.approx(expected.item(), rel=1e-5)
    few = DistanceSettings(kid_subsets=5, kid_subset_size=500)
    same = distances(["kid"], _set(_normal(2000, 4, 2)), _set(_normal(2000, 4, 3)), few)
    assert abs(same["kid"]) < 0.05


def _prdc_by_loops(real, generated, k):
    def radius(points, i):
        return sorted(torch.dist(points[i], p).item() for p in points)[k]

    real_radius = [radius(real, i) for i in range(len(real))]
    generated_radius = [radius(generated, i) for i in range(len(generated))]
    inside = [
        [torch.dist(g, r).item() <= rr for r, rr in zip(real, real_radius, strict=True)]
        for g in generated
    ]
    precision = sum(any(row) for row in inside) / len(generated)
    balls = list(zip(generated, generated_radius, strict=True))
    recall = sum(any(torch.dist(r, g).item() <= gr for g, gr in balls) for r in real) / len(real)
    density = sum(map(sum, inside)) / (k * len(generated))
    coverage = sum(any(row[i] for row in inside) for i in range(len(real))) / len(real)
    return precision, recall, density, coverage


@pytest.mark.parametrize("rows", [7, 4096])
def test_prdc_is_its_definition(monkeypatch, rows):
    monkeypatch.setattr("nvae.evaluation.distances._ROWS", rows)
    real, generated = _normal(40, 2, 0).double(), 0.6 * _normal(25, 2, 1).double() + 0.5
    found = prdc(real, generated, neighbors=3)
    expected = _prdc_by_loops(real, generated, 3)
    got = (found.precision, found.recall, found.density, found.coverage)
    assert got == pytest.approx(expected, rel=1e-12)
    assert 0 < expected[1] < expected[0] <= 1  # the case is not a trivial one


def test_precision_and_recall_agree_with_torch_fidelity():
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    real, generated = _normal(200, 6, 0), 0.8 * _normal(150, 6, 1) + 0.4
    found = prdc(real, generated, neighbors=3)
    precision, recall = calculate_precision_recall_full(generated, real, 3, 1000)
    assert (found.precision, found.recall) == pytest.approx((precision, recall), abs=0.01)


def test_coverage_sees_what_recall_by_one_outlier_hides():
    """A mode that is missing lowers coverage and recall, not precision."""
    real = torch.cat([_normal(100, 2, 0), _normal(100, 2, 1) + 20])
    generated = _normal(200, 2, 2)
    found = prdc(real, generated)
    assert found.precision > 0.9
    assert found.recall == pytest.approx(0.5, abs=0.05)
    assert found.coverage == pytest.approx(0.5, abs=0.05)


def test_inception_score_in_closed_form():
    """Certain and evenly spread over c classes: exp(H) = c. Uniform predictions: 1."""
    certain = 1000.0 * torch.nn.functional.one_hot(torch.arange(400) % 4, 4).float()
    settings = DistanceSettings(is_splits=1)
    features = torch.zeros(400, 2)
    found = distances(["is"], _set(features), _set(features, certain), settings)
    assert found["inception_score"] == pytest.approx(4, rel=1e-6)
    vague = torch.zeros(400, 4)
    found = distances(["is"], _set(features), _set(features, vague), settings)
    assert found["inception_score"] == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["lpips"], "allowed: fid, kid, prdc, is"),
        (["kid"], "kid_subset_size"),
        (["is"], "logits"),
    ],
)
def test_impossible_requests_are_refused(names, words):
    features = _set(_normal(5, 2, 0))
    with pytest.raises(ValueError, match=words):
        distances(names, features, features)


def test_impossible_requests_are_known_from_numbers_alone():
    settings = DistanceSettings(kid_subset_size=20)
    check_possible(["fid", "kid", "prdc", "is"], 20, 20, logits=True, settings=settings)
    for names, real, generated, logits, words in (
        (["kid"], 19, 20, True, "only 19 real"),
        (["kid"], 20, 19, True, "only 19 generated"),
        (["fid"], 1, 20, True, "fid needs at least 2 real"),
        (["prdc"], 5, 20, True, "more than 5 real"),
        (["is"], 20, 9, True, "is_splits is 10"),
        (["is"], 20, 20, False, "class logits"),
    ):
        with pytest.raises(ValueError, match=words):
            check_possible(names, real, generated, logits=logits, settings=settings)


def test_prdc_needs_more_images_than_neighbors_and_all_their_features():
    with pytest.raises(ValueError, match="more than 5 generated"):
        prdc(_normal(10, 2, 0), _normal(5, 2, 1))
    moments_only = FeatureSet(_moments(_normal(10, 2, 0)))
    with pytest.raises(ValueError, match="moments alone"):
        distances(["prdc"], moments_only, moments_only)
