"""Classes as a condition, in all three families."""

import pytest
import torch

from nvae.checkpoint import load_model, save_model
from nvae.data.dataset import ImageBatch
from nvae.evaluation.likelihood import evaluate
from nvae.export.sampler import Sampler, export_sampler, largest_difference
from nvae.models import MODELS, NVAE
from nvae.models.conditioning import NO_LABEL, guided
from nvae.objective import ObjectiveConfig, build_objective
from nvae.sampling import decode, encode, interpolate, prior_latents, resample_finer, sample_images
from nvae.sampling.compiled import PriorDecoder
from nvae.training.recompute import recompute_segments

from .small import VERY_DEEP, small_config


def build(family, classes):
    torch.manual_seed(0)
    if family == "nvae":
        return NVAE(small_config(image_size=8, num_classes=classes))
    return MODELS[family](VERY_DEEP[family](num_classes=classes))


@pytest.fixture(params=["nvae", *VERY_DEEP])
def model(request):
    """One that knows three classes, with weights that make all of it matter."""
    model = build(request.param, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double().eval()


@pytest.fixture
def x():
    pixels = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    return (pixels > 0.5).double()


LABELS = torch.tensor([0, 1, 2, NO_LABEL])


def groups_of(model):
    return [name for name, _ in model.named_parameters() if name.startswith("classes.")]


@pytest.mark.parametrize("family", ["nvae", *VERY_DEEP])
def test_a_model_without_classes_is_what_it_was(family):
    plain, conditional = build(family, 0), build(family, 3)
    assert not groups_of(plain)
    assert len(groups_of(conditional)) == conditional.num_groups
    # classes add nothing before they are trained, and take no random numbers of the other weights
    shared = {k: v for k, v in conditional.state_dict().items() if not k.startswith("classes.")}
    torch.testing.assert_close(shared, plain.state_dict(), rtol=0, atol=0)
    noise = plain.eval().draw_noise(3)
    logits = plain.sample_logits(3, 1.0, noise)
    drawn = conditional.eval().sample_logits(3, 1.0, noise, labels=LABELS[:3])
    torch.testing.assert_close(drawn, logits, rtol=0, atol=0)


def test_every_group_hears_the_label_of_its_own_image(model, x):
    noise = model.draw_noise(4)
    with torch.no_grad():
        plain, told = model(x, noise), model(x, noise, LABELS)
        turned = model(x, noise, LABELS.roll(1))
    assert not torch.allclose(told.logits[0], plain.logits[0])
    assert not torch.allclose(told.logits[0], turned.logits[0])
    torch.testing.assert_close(told.logits[3], plain.logits[3])  # it has none
    loss = model(x, noise, LABELS).kl_per_group.sum() + model(x, noise, LABELS).logits.sum()
    loss.backward()
    for gradient in (table.grad for table in model.classes.groups):
        assert (gradient.abs().sum(1) > 0).all()


def test_training_recomputes_with_labels(model, x):
    config = ObjectiveConfig(kl_anneal_portion=0, spectral_weight=0)
    noise, gradients = model.draw_noise(4), []
    for recompute in (False, True):
        model.zero_grad()
        if recompute:
            recompute_segments(model)
        objective = build_objective(model, config).double()
        objective(model.train(), x, noise, step=0, total_steps=1, labels=LABELS).data.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients)


def test_guidance(model):
    noise = model.draw_noise(3)
    labels = LABELS[:3]

    def draw(**more):
        return model.sample_logits(3, 0.8, noise, **more)

    torch.testing.assert_close(draw(labels=labels, guidance=1.0), draw(labels=labels))
    strong = draw(labels=labels, guidance=3.0)
    assert strong.shape == draw().shape
    assert not torch.allclose(strong, draw(labels=labels))
    # without labels there is nothing to follow
    nothing = torch.full((3,), NO_LABEL)
    torch.testing.assert_close(draw(labels=nothing, guidance=3.0), draw())
    # every image goes its own way: alone it is the same
    alone = model.sample_logits(
        1, 0.8, [eps[1:2] for eps in noise], labels=labels[1:2], guidance=3.0
    )
    torch.testing.assert_close(alone, strong[1:2])
    with pytest.raises(ValueError, match="guidance is -1"):
        draw(labels=labels, guidance=-1.0)


def test_guided_priors():
    mean = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)  # with the label, and without
    log_sigma = torch.tensor([0.5, 0.0]).view(2, 1, 1, 1)
    for weight, expected in {0: (3.0, 0.0), 0.5: (2.0, 0.25), 1: None, 2: (-1.0, 0.5)}.items():
        found = guided((mean, log_sigma), weight)
        if expected is None:
            assert found == (mean, log_sigma)
        else:
            assert found[0].flatten().tolist() == [expected[0]] * 2
            assert found[1].flatten().tolist() == [expected[1]] * 2


def test_latents_keep_their_labels(model, x):
    latents = encode(model, x, labels=LABELS, batch_size=3)
    mean = decode(model, latents)
    with torch.no_grad():
        zero = [torch.zeros(s).double() for s in model.noise_shapes(4)]
        expected = model.likelihood(model(x, zero, LABELS).logits).mean
    torch.testing.assert_close(mean, expected)
    assert not torch.allclose(decode(model, encode(model, x))[0], mean[0])
    path = interpolate(model, latents[:2], latents[1:3], 4)
    assert path.labels.tolist() == [0, 0, 1, 1, 1, 1, 2, 2]
    torch.testing.assert_close(decode(model, path)[[0, 3]], mean[:2])
    finer = resample_finer(model, latents, model.num_groups, torch.arange(4))
    torch.testing.assert_close(decode(model, finer), mean)
    with pytest.raises(ValueError, match="one end has labels"):
        interpolate(model, latents[:2], encode(model, x)[1:3], 4)


def test_samples_of_classes(model):
    seeds, labels = range(3), [2, 0, 2]
    images = sample_images(model, seeds, labels=labels, pixel_temperature="mean", batch_size=2)
    alone = sample_images(model, [2], labels=[2], pixel_temperature="mean")
    torch.testing.assert_close(images[2:], alone)
    drawn = prior_latents(model, torch.arange(3), labels=torch.tensor(labels))
    torch.testing.assert_close(decode(model, drawn), images)
    # the decoding half, as what is compiled and exported has it
    decoder = PriorDecoder(model, guidance=2.0)
    noise, temperature, classes = decoder.example(2)
    torch.testing.assert_close(
        decoder(noise, temperature, classes),
        model.sample_logits(2, temperature.tolist(), noise, labels=classes, guidance=2.0),
    )


def test_exported_sampler_takes_labels(model):
    sampler = Sampler(model.float())
    program = export_sampler(sampler)
    assert largest_difference(sampler, program.module()) < 1e-5
    noise, temperature, pixels, labels = sampler.example(2)
    one, other = (program.module()(noise, temperature, pixels, (labels + k) % 3) for k in (0, 1))
    assert not torch.allclose(one, other)


def test_likelihood_with_and_without_labels(model, x):
    batches = [
        ImageBatch(x[:3], torch.arange(3), LABELS[:3]),
        ImageBatch(x[3:], torch.arange(3, 4), LABELS[3:]),
    ]
    told = evaluate(model, batches, importance_samples=[2], chunk=2)
    untold = evaluate(model, batches, labels=False)
    with_none = evaluate(model, [ImageBatch(x, torch.arange(4))])
    assert told.negative_elbo != untold.negative_elbo
    assert untold.negative_elbo == with_none.negative_elbo
    again = evaluate(model, [ImageBatch(x, torch.arange(4), LABELS)], importance_samples=[2])
    assert again.negative_elbo.mean == pytest.approx(told.negative_elbo.mean, rel=1e-12)


def test_checkpoint(model, x, tmp_path):
    save_model(model.float(), tmp_path / "model.ckpt")
    loaded = load_model(tmp_path / "model.ckpt")
    noise = model.draw_noise(4)
    torch.testing.assert_close(
        loaded(x.float(), noise, LABELS).logits, model(x.float(), noise, LABELS).logits
    )


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 3]), "label 3 is none of the model's classes, 0 to 2"),
        (torch.tensor([0, -2, 1]), "label -2 is none"),
        (torch.tensor([0, 1]), r"of shape \(2,\)"),
        (torch.tensor([0.0, 1.0, 2.0]), "torch.float32"),
    ],
)
def test_wrong_labels(labels, message):
    model = build("nvae", 3).eval()
    with pytest.raises(ValueError, match=message):
        model.sample(3, labels=labels)
    with pytest.raises(ValueError, match="has no classes"):
        build("nvae", 0).eval().sample(3, labels=labels)
