"""Encode, decode and paths: round trips and end points, not pictures."""

from dataclasses import replace

import pytest
import torch

from nvae.sampling import (
    concatenate,
    decode,
    encode,
    from_noise,
    interpolate,
    prior_latents,
    resample_finer,
    sample_images,
    slerp,
    traverse,
)

from .models import small_nvae


@pytest.fixture
def x():
    return torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(3)).round()


@pytest.mark.parametrize("flows", [0, 1])
def test_encoding_is_what_the_forward_pass_draws(x, flows):
    model = small_nvae(flows=flows)
    latents = encode(model, x)
    output = model(x, [torch.zeros(shape) for shape in model.noise_shapes(3)])
    for z, group in zip(latents.z, output.groups, strict=True):
        assert torch.allclose(z, group.z, atol=1e-6)
    assert torch.allclose(decode(model, latents), model.likelihood(output.logits).mean, atol=1e-5)


def test_noise_coordinates_reproduce_the_latents(x):
    """(z - mu_p) / sigma_p, fed to the prior, must walk to the same z again."""
    model = small_nvae().double()
    latents = encode(model, x.double(), seeds=torch.tensor([4, 5, 6]))
    again = from_noise(model, latents.noise)
    for z, other in zip(latents.z, again.z, strict=True):
        assert torch.allclose(z, other, rtol=1e-9)


def test_images_take_the_models_type(x):
    """A published file in float64 makes a model of that type; images of a data set have 32 bits."""
    model = small_nvae().double()
    for z, other in zip(encode(model, x).z, encode(model, x.double()).z, strict=True):
        assert z.dtype == torch.float64
        assert torch.equal(z, other)


def test_posterior_draws_depend_on_the_seed_only(x):
    model, x = small_nvae().double(), x.double()  # float32 rounds with the batch
    seeds = torch.tensor([4, 5, 6])
    all_three, one = encode(model, x, seeds), encode(model, x[1:2], seeds[1:2])
    for z, single in zip(all_three.z, one.z, strict=True):
        assert torch.allclose(z[1:2], single, atol=1e-9)
    assert not torch.allclose(all_three.z[0], encode(model, x).z[0], atol=1e-2)


@pytest.mark.parametrize("temperature", [1.0, 0.6, [0.5, 1.0, 0.0]])
def test_latents_of_seeds_are_those_of_the_samples(temperature):
    model = small_nvae("normal")
    seeds = torch.arange(5)
    images = sample_images(model, seeds, temperature=temperature, pixel_temperature=0.5)
    latents = prior_latents(model, seeds, temperature)
    assert torch.allclose(decode(model, latents, 0.5, seeds=seeds), images, atol=1e-5)
    again = from_noise(model, latents.noise)  # coordinates are those at temperature 1
    assert torch.allclose(again.z[-1], latents.z[-1], atol=1e-4)


def test_batches_change_nothing(x):
    model, x = small_nvae("normal").double(), x.double()
    seeds = torch.tensor([4, 5, 6])
    once, thrice = encode(model, x, seeds), encode(model, x, seeds, batch_size=1)
    noise = from_noise(model, once.noise, 0.8, batch_size=2).z
    for a, b in zip((*once.z, *noise), (*thrice.z, *from_noise(model, once.noise, 0.8).z),
                    strict=True):  # fmt: skip
        assert torch.allclose(a, b, atol=1e-5)
    one_by_one = decode(model, once, 0.5, seeds=seeds, batch_size=1)
    assert torch.allclose(decode(model, once, 0.5, seeds=seeds), one_by_one, atol=1e-5)


def test_path_ends_where_it_should():
    model = small_nvae("normal")
    start, end = (prior_latents(model, torch.tensor(s)) for s in ([0, 1], [2, 3]))
    path = interpolate(model, start, end, 5)
    assert len(path) == 10
    images = decode(model, path)
    assert torch.allclose(images[[0, 5]], decode(model, start), atol=1e-4)
    assert torch.allclose(images[[4, 9]], decode(model, end), atol=1e-4)
    back = decode(model, interpolate(model, end, start, 5))
    assert torch.allclose(images[:5].flip(0), back[:5], atol=1e-4)


def test_slerp_keeps_the_length_and_turns_evenly():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4, 2, 3, 3, generator=generator, dtype=torch.float64)
    b = torch.randn(4, 2, 3, 3, generator=generator, dtype=torch.float64)
    b = b * (a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    middle = slerp(a, b, 0.5)
    assert torch.allclose(middle.flatten(1).norm(dim=1), a.flatten(1).norm(dim=1))
    cosine = torch.nn.functional.cosine_similarity
    to_a = cosine(a.flatten(1), middle.flatten(1))
    to_b = cosine(b.flatten(1), middle.flatten(1))
    assert torch.allclose(to_a, to_b)
    assert torch.allclose(2 * torch.acos(to_a), torch.acos(cosine(a.flatten(1), b.flatten(1))))


def test_slerp_survives_ends_without_a_great_circle():
    a = torch.ones(1, 2, 2, 2)
    assert torch.allclose(slerp(a, a, 0.3), a)
    assert torch.isfinite(slerp(a, -a, 0.3)).all()
    assert torch.isfinite(slerp(a, torch.zeros_like(a), 0.3)).all()
    assert torch.allclose(slerp(a, 3 * a, 0.5), 2 * a)


def test_kept_groups_stay_and_finer_ones_are_drawn(x):
    model = small_nvae()
    latents = encode(model, x)
    seeds = torch.tensor([1, 2, 3])
    some = resample_finer(model, latents, 1, seeds)
    assert torch.equal(some.z[0], latents.z[0])
    assert not torch.allclose(some.z[1], latents.z[1], atol=1e-2)
    everything = resample_finer(model, latents, 3, seeds)
    assert all(torch.equal(a, b) for a, b in zip(everything.z, latents.z, strict=True))
    nothing = resample_finer(model, latents, 0, seeds, temperature=0.7)
    fresh = prior_latents(model, seeds, 0.7)
    assert torch.allclose(nothing.z[-1], fresh.z[-1], atol=1e-5)
    with pytest.raises(ValueError, match="0 to 3"):
        resample_finer(model, latents, 4, seeds)


def test_traversal_moves_one_group_on_a_half_circle(x):
    model = small_nvae()
    latents = prior_latents(model, torch.tensor([0, 1]))
    path = traverse(model, latents, 1, 5, torch.tensor([0, 1]))
    assert len(path) == 10
    first = path.noise[1].view(2, 5, -1)
    assert torch.allclose(first[:, 0], latents.noise[1].flatten(1), atol=1e-4)
    assert torch.allclose(first[:, -1], -latents.noise[1].flatten(1), atol=1e-4)
    length = first.norm(dim=2)
    assert torch.allclose(length, length[:, :1].expand(2, 5), rtol=1e-4)
    for group in (0, 2):
        fixed = path.noise[group].view(2, 5, -1)
        assert torch.allclose(fixed, fixed[:, :1].expand_as(fixed), atol=1e-4)
    assert not torch.allclose(first[:, 0], first[:, 1], atol=1e-1)


def test_a_single_number_cannot_turn():
    """The direction aside would be 0 / 0."""
    model = small_nvae()
    latents = prior_latents(model, torch.tensor([0]))
    single = replace(latents, noise=[latents.noise[0][:, :1, :1, :1], *latents.noise[1:]])
    with pytest.raises(ValueError, match="single number"):
        traverse(model, single, 0, 5, torch.tensor([0]))


def test_slices_and_concatenation_are_inverse():
    latents = prior_latents(small_nvae(), torch.arange(4))
    whole = concatenate([latents[:1], latents[1:]])
    assert all(torch.equal(a, b) for a, b in zip(whole.z, latents.z, strict=True))
    assert torch.equal(latents.repeat(2).noise[0][5], latents.noise[0][2])


def test_wrong_input_is_refused(x):
    model = small_nvae()
    with pytest.raises(ValueError, match="the model takes"):
        encode(model, torch.zeros(1, 3, 8, 8))
    latents = encode(model, x)
    with pytest.raises(ValueError, match="at least 2"):
        interpolate(model, latents, latents, 1)
    with pytest.raises(ValueError, match="give as many"):
        interpolate(model, latents, latents[:1], 3)
    with pytest.raises(ValueError, match="0 \\(coarsest\\) to 2"):
        traverse(model, latents, 3, 4, torch.arange(3))
    with pytest.raises(ValueError, match="pixel_temperature"):
        decode(model, latents, "median")


@pytest.mark.parametrize("flows", [0, 1])
def test_latents_and_logits_come_in_rows_without_gradients(x, flows):
    """Evaluation on the CPU computes in channels_last; callers may view what they get."""
    model = small_nvae(flows=flows).eval()
    with torch.no_grad():
        output = model(x, model.draw_noise(len(x)))
    assert all(group.z.is_contiguous() for group in output.groups)
    assert output.logits.is_contiguous()
