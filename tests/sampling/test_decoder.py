"""The decoding half alone, plain and compiled."""

import shutil

import pytest
import torch

from nvae.models import NVAE
from nvae.sampling import CompiledDecoder, sample_images
from nvae.sampling.compiled import CompilerError, PriorDecoder, for_inductor

from .models import small_nvae

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler"
)


@pytest.fixture(scope="module")
def model() -> NVAE:
    model = small_nvae("normal", flows=1)
    model.train()(torch.rand(8, 1, 8, 8))  # statistics that differ from a fresh model's
    return model.eval()


def test_decoder_gives_the_logits_of_the_model(model: NVAE) -> None:
    noise = model.draw_noise(3)
    temperatures = [0.2, 1.0, 0.5]
    found = PriorDecoder(model)(noise, torch.tensor(temperatures))
    torch.testing.assert_close(found, model.sample_logits(3, temperatures, noise))


def test_decoder_is_a_copy(model: NVAE) -> None:
    """Recalibrating or training the model afterwards must not change what was handed out."""
    other = small_nvae("normal")
    decoder = PriorDecoder(other)
    arguments = decoder.example(2)
    before = decoder(*arguments)
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(2)
    assert torch.equal(decoder(*arguments), before)
    assert not [name for name in decoder.state_dict() if "encoder" in name or "flow" in name]


def test_form_for_the_compiler_gives_the_same_numbers(model: NVAE) -> None:
    decoder = PriorDecoder(model).double()
    arguments = [each.double() for each in decoder.example(3)[0]], decoder.example(3)[1].double()
    found = for_inductor(decoder)(*arguments)
    torch.testing.assert_close(found, decoder(*arguments), rtol=1e-12, atol=1e-12)


@needs_compiler
@torch.inference_mode()
def test_compiled_images_are_the_same(model: NVAE) -> None:
    """Last batches with fewer images, and other temperatures, use the same machine code."""
    decode = CompiledDecoder(model, batch_size=3)
    for temperature in (0.7, [0.2, 1.0, 0.5]):
        plain = sample_images(model, range(7), temperature=temperature, batch_size=3)
        compiled = sample_images(
            model, range(7), temperature=temperature, batch_size=3, decode=decode
        )
        torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="compiled for 3"):
        decode(model.draw_noise(4), 1.0)
    with pytest.raises(ValueError, match="0 or more"):
        decode(model.draw_noise(1), -1.0)


def test_a_missing_compiler_is_one_clear_line(model: NVAE) -> None:
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(CompilerError, match=r"C\+\+ compiler .* is needed") as caught,
    ):
        CompiledDecoder(model, batch_size=5)
    assert "\n" not in str(caught.value)
