"""A seed's picture and an image's likelihood must not depend on the device."""

from types import SimpleNamespace

import pytest
import torch

from nvae.evaluation import evaluate
from nvae.random import STREAM_PRIOR, image_keys, latent_noise
from nvae.sampling import CompiledDecoder, sample_images

from .models import small_nvae

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_noise_is_the_same_on_both_devices():
    index = torch.arange(50)
    on_cpu = latent_noise(image_keys(index, seed=3, stream=STREAM_PRIOR), [(2, 5, 5)])[0]
    on_gpu = latent_noise(image_keys(index.cuda(), seed=3, stream=STREAM_PRIOR), [(2, 5, 5)])[0]
    assert torch.allclose(on_cpu, on_gpu.cpu(), atol=1e-5)


def test_samples_are_the_same_on_both_devices():
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    model = small_nvae("normal").double()
    on_cpu = sample_images(model, range(6), temperature=0.7, pixel_temperature=0.5)
    on_gpu = sample_images(model.cuda(), range(6), temperature=0.7, pixel_temperature=0.5)
    assert torch.allclose(on_cpu, on_gpu, atol=1e-6)


def test_compiled_and_replayed_samples_are_the_same():
    """torch.compile with CUDA graphs, whose outputs live until the next replay."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    model = small_nvae("normal").cuda()
    plain = sample_images(model, range(7), temperature=0.7, batch_size=3)
    decode = CompiledDecoder(model, batch_size=3)
    for _ in range(3):  # warm-up, capture, replay
        replayed = sample_images(model, range(7), temperature=0.7, batch_size=3, decode=decode)
        assert torch.allclose(replayed, plain, atol=1e-4)


def test_samples_by_kernels_and_without_are_the_same():
    """Folded cells, and the copy that is compiled and replayed."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    model = small_nvae("normal", flows=1).cuda().to(memory_format=torch.channels_last)
    pictures = []
    for kernels in ("reference", "auto"):
        model.choose_kernels(kernels)
        pictures.append(sample_images(model, range(7), temperature=0.7, batch_size=3))
        decode = CompiledDecoder(model, batch_size=3)
        for _ in range(3):  # warm-up, capture, replay
            images = sample_images(model, range(7), temperature=0.7, batch_size=3, decode=decode)
        pictures.append(images)
    for other in pictures[1:]:
        assert torch.allclose(other, pictures[0], atol=1e-4)


def test_likelihood_by_kernels_and_without_is_the_same():
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    x = torch.rand(5, 1, 8, 8, device="cuda").round()
    model = small_nvae(flows=1).cuda().to(memory_format=torch.channels_last)
    found = []
    for kernels in ("reference", "auto"):
        model.choose_kernels(kernels)
        batch = SimpleNamespace(x=x, index=torch.arange(5))
        found.append(evaluate(model, [batch], importance_samples=(6,)).negative_elbo.mean)
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_likelihood_is_the_same_on_both_devices():
    x = torch.rand(5, 1, 8, 8, dtype=torch.float64).round()
    batch = SimpleNamespace(x=x, index=torch.arange(5))
    model = small_nvae().double()
    on_cpu = evaluate(model, [batch], importance_samples=(6,))
    on_gpu = evaluate(model.cuda(), [batch], importance_samples=(6,))
    assert on_gpu.negative_elbo.mean == pytest.approx(on_cpu.negative_elbo.mean, rel=1e-7)
    bounds = [result.importance_weighted[0].nll.mean for result in (on_cpu, on_gpu)]
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-7)
