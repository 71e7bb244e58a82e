"""Rectangles, any number of channels and more than 8 bits through all three families."""

import json
from pathlib import Path

import pytest
import torch

from nvae.checkpoint import load_model, save_model
from nvae.export.sampler import Sampler, export_sampler, largest_difference
from nvae.models import EVDVAE, NVAE, VDVAE, EVDVAEConfig, HierarchicalVAE, ModelConfig, VDVAEConfig
from nvae.sampling import sample_images
from nvae.sampling.latents import decode, encode, interpolate, traverse

IMAGES = {
    "tall, 2 channels, 10 bits": {"image_size": (24, 16), "image_channels": 2, "bits": 10},
    "wide, 4 channels, 12 bits": {"image_size": (8, 24), "image_channels": 4, "bits": 12},
    "5 channels, 16 bits": {"image_size": 8, "image_channels": 5, "bits": 16},
    "tall gray, 12 bits": {"image_size": (16, 8), "image_channels": 1, "bits": 12},
}


def build(family: str, images: dict[str, object]) -> HierarchicalVAE:
    torch.manual_seed(0)
    values: dict[str, object] = {"likelihood": "logistic_mixture", "num_mixtures": 2, **images}
    if family == "nvae":
        return NVAE(
            ModelConfig(
                **values, num_scales=2, groups_per_scale=2, preprocess_blocks=1,
                preprocess_cells=1, postprocess_cells=1, encoder_cells_per_group=1,
                decoder_cells_per_group=1, encoder_channels=8, decoder_channels=8,
                latent_channels=3, num_flows=1,
            )  # type: ignore[arg-type]
        )  # fmt: skip
    if family == "vdvae":
        side = 16 if images["image_size"] in ((24, 16), 16) else 8
        return VDVAE(
            VDVAEConfig(
                **values, encoder_blocks=f"{side}x1,{side}d{side // 4},4x1,4d2,2x1",
                decoder_blocks=f"2x1,4m2,4x1,{side}m4", width=12,
            )  # type: ignore[arg-type]
        )  # fmt: skip
    return EVDVAE(EVDVAEConfig(**values, up_strides=[2, 2, 2, 1], down_strides=[1, 2, 2, 2]))  # type: ignore[arg-type]


def drawn(model: HierarchicalVAE, n: int) -> torch.Tensor:
    levels = 2**model.config.bits
    return torch.randint(levels, (n, *model.config.image_shape)) / (levels - 1)


@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("family", ["nvae", "vdvae", "evdvae"])
def test_trains_samples_and_is_kept(tmp_path: Path, family: str, images: str) -> None:
    """A few steps lower the loss; draws, paths and the checkpoint have the image's shape."""
    model = build(family, IMAGES[images])
    shape = model.config.image_shape
    x = (drawn(model, 1) + torch.zeros(8, *shape)).contiguous()  # one image, to be learned
    optimizer = torch.optim.Adamax(model.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        output = model(x, noise=[torch.zeros(s) for s in model.noise_shapes(8)])
        log_prob = model.likelihood(output.logits).log_prob(x)
        loss = (output.kl_per_group.sum(1) - log_prob).mean() / model.config.counted_pixels
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    model.eval()
    images_drawn = sample_images(model, range(3), pixel_temperature=1.0)
    assert images_drawn.shape == (3, *shape)
    assert ((images_drawn >= 0) & (images_drawn <= 1)).all()
    latents = encode(model, x[:2])
    assert decode(model, interpolate(model, latents[:1], latents[1:], 3)).shape == (3, *shape)
    assert decode(model, traverse(model, latents, 0, 2, torch.tensor([1, 2]))).shape == (4, *shape)

    save_model(model, tmp_path / "a.ckpt")
    loaded = load_model(tmp_path / "a.ckpt")
    assert loaded.config == model.config
    again = sample_images(loaded, range(3), pixel_temperature=1.0)
    torch.testing.assert_close(again, images_drawn, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["nvae", "vdvae", "evdvae"])
def test_is_exported(family: str) -> None:
    """The program takes the latents' and gives the image's height and width."""
    model = build(family, IMAGES["tall, 2 channels, 10 bits"])
    model(drawn(model, 4))
    sampler = Sampler(model.eval(), pixel_temperature=1.0)
    program = export_sampler(sampler).module()
    assert largest_difference(sampler, program) <= 1e-5
    assert program(*sampler.example(3)).shape == (3, 2, 24, 16)


@pytest.mark.parametrize("family", ["nvae", "vdvae", "evdvae"])
def test_a_square_has_the_weights_that_it_had(family: str) -> None:
    """One number and two equal ones are one model, the form of older checkpoints."""
    number = build(family, {"image_size": 16, "image_channels": 3, "bits": 8})
    values = json.loads(json.dumps(number.config.to_dict())) | {"image_size": [16, 16]}
    assert type(number.config).from_dict(values) == number.config
    assert number.config.to_dict()["image_size"] == 16
