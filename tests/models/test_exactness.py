"""The published model, number by number, in float64.

Each test breaks if any operation of the network, the densities or the objective deviates.
"""

import numpy as np
import pytest
import torch

from nvae.elbo import balancing_alpha, elbo
from nvae.models import NVAE
from nvae.models.config import groups_per_scale
from nvae.models.layers import skip_splits
from nvae.published import name_pairs
from nvae.regularizers import SpectralNorm, batchnorm_penalty, batchnorms, spectral_convs
from tests.reference import NAMES, Reference, load_reference


@pytest.fixture(params=NAMES)
def reference(request: pytest.FixtureRequest) -> Reference:
    return load_reference(request.param)


@pytest.mark.parametrize("folded", [True, False], ids=["no_grad", "grad"])
def test_evaluation_mode(reference: Reference, folded: bool) -> None:
    """Running statistics; with and without the BN folding that no_grad allows."""
    with torch.set_grad_enabled(not folded):
        output = reference.model(reference.x, reference.noise())
        likelihood = reference.model.likelihood(output.logits)
        log_likelihood = likelihood.log_prob(reference.x)
    reference.assert_close(reference.thin(output.logits), "eval_logits")
    reference.assert_close(output.logits.sum(), "eval_logits_sum")
    reference.assert_close(output.logits.square().sum(), "eval_logits_sq")
    reference.assert_close(output.kl_per_group, "eval_kl_per_group")
    reference.assert_close(output.log_q, "eval_log_q")
    reference.assert_close(output.log_p, "eval_log_p")
    reference.assert_close(-log_likelihood, "eval_reconstruction_loss")
    reference.assert_close(-log_likelihood + output.kl_per_group.sum(1), "eval_negative_elbo")
    reference.assert_close(log_likelihood + output.log_p - output.log_q, "eval_log_iw")
    reference.assert_close(reference.thin(likelihood.mean), "eval_output_mean")
    for g, kl in enumerate(output.kl_per_channel):
        reference.assert_close(kl.mean(0), f"eval_kl_diag_{g:03d}")


def test_training_mode(reference: Reference) -> None:
    """Batch statistics, balanced KL, and the running statistics afterwards."""
    model, expected = reference.model.train(), reference.expected
    output = model(reference.x, reference.noise())
    alpha = balancing_alpha(groups_per_scale(model.config))
    terms = elbo(
        output,
        model.likelihood(output.logits).log_prob(reference.x),
        beta=float(expected["kl_coeff"]),
        alpha=alpha,
    )
    reference.assert_close(reference.thin(output.logits), "train_logits")
    reference.assert_close(output.kl_per_group, "train_kl_per_group")
    reference.assert_close(terms.reconstruction, "train_reconstruction_loss")
    reference.assert_close(terms.kl_term, "train_balanced_kl")
    reference.assert_close(terms.kl_weights, "train_kl_coeffs")
    reference.assert_close(alpha, "train_kl_alpha")

    state = model.state_dict()
    ours = {source: target for target, sources in name_pairs(model) for source in sources}
    for name, norm in zip(expected["bn_after_names"], expected["bn_after_norms"], strict=True):
        assert float(state[ours[name]].norm()) == pytest.approx(norm, rel=1e-7), name


def test_regularizers_and_total_loss(reference: Reference) -> None:
    """Spectral and BN penalties, the whole loss, and the norm of its gradient."""
    model, expected = reference.model.train(), reference.expected
    output = model(reference.x, reference.noise())
    terms = elbo(
        output,
        model.likelihood(output.logits).log_prob(reference.x),
        beta=float(expected["kl_coeff"]),
        alpha=balancing_alpha(groups_per_scale(model.config)),
    )
    spectral = SpectralNorm(spectral_convs(model))()
    batchnorm = batchnorm_penalty(batchnorms(model))
    assert spectral.item() == pytest.approx(float(expected["train_spectral_loss_exact"]), rel=1e-3)
    reference.assert_close(batchnorm, "train_batchnorm_loss")

    loss = terms.loss + float(expected["spectral_coeff"]) * (spectral + batchnorm)
    loss.backward()
    # the reference's own power iteration stopped elsewhere: compare at its spectral value
    shift = float(expected["spectral_coeff"]) * (
        float(expected["train_spectral_loss"]) - spectral.item()
    )
    reference.assert_close(loss + shift, "train_loss")
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == len(list(model.parameters())), "a parameter is unused"
    norm = torch.stack([g.norm() for g in gradients]).norm()
    assert norm.item() == pytest.approx(float(expected["train_grad_norm"]), rel=1e-6)


def test_elbo_gradient_of_every_parameter(reference: Reference) -> None:
    """Norm of the unbalanced negative ELBO's gradient, name by name in the published format."""
    model, expected = reference.model.train(), reference.expected
    output = model(reference.x, reference.noise())
    elbo(output, model.likelihood(output.logits).log_prob(reference.x)).loss.backward()
    gradients = published_gradients(model)
    assert set(gradients) == set(expected["elbo_grad_names"])
    norms = np.array([gradients[name].norm().item() for name in expected["elbo_grad_names"]])
    # a bias in front of a BN has no gradient but rounding: hence the absolute tolerance
    np.testing.assert_allclose(norms, expected["elbo_grad_norms"], rtol=1e-7, atol=1e-9)


def published_gradients(model: NVAE) -> dict[str, torch.Tensor]:
    """Published name to (our part of) a parameter's gradient."""
    ours = dict(model.named_parameters())
    named: dict[str, torch.Tensor] = {}
    for target, sources in name_pairs(model):
        if target not in ours:
            continue
        gradient = ours[target].grad
        assert gradient is not None, f"{target} has no gradient"
        # what several published tensors make up is cut as FactorizedSkip is
        sizes = skip_splits(len(gradient)) if len(sources) > 1 else [len(gradient)]
        named.update(zip(sources, gradient.split(sizes), strict=True))
    return named


def test_sampling_at_a_temperature(reference: Reference) -> None:
    """Logits of a draw from the priors with sigma scaled by t."""
    logits = reference.model.sample_logits(
        2, float(reference.expected["sample_temperature"]), reference.noise("sample_eps")
    )
    reference.assert_close(reference.thin(logits), "sample_logits")
    reference.assert_close(logits.sum(), "sample_logits_sum")
    reference.assert_close(logits.square().sum(), "sample_logits_sq")


def test_size_of_the_model(reference: Reference) -> None:
    model, expected = reference.model, reference.expected
    assert sum(p.numel() for p in model.parameters()) == int(expected["parameters"])
    assert groups_per_scale(model.config) == tuple(expected["groups_per_scale"])
