"""What goes in comes out, whatever family, likelihood, batch, block, process; or nothing does."""

import subprocess
import sys

import pytest
import torch

from nvae.checkpoint import save_model
from nvae.codec import chain
from nvae.codec.chain import decode_block, encode_block
from nvae.codec.codec import Codec
from nvae.codec.coder import EmptyStackError
from nvae.codec.container import ArchiveError, from_bytes
from nvae.codec.pixels import level_type
from nvae.codec.walk import PassSettings, Walk
from tests.outside import TwoGroups, TwoGroupsConfig

from .models import images_for, model_of, nudged

CASES = [
    ("nvae", {"bits": 8, "likelihood": "logistic_mixture"}),
    ("nvae", {"bits": 4, "likelihood": "logistic_mixture", "counted_size": 6}),
    ("nvae", {"bits": 3, "likelihood": "logistic_mixture", "image_channels": 3}),
    ("nvae", {"bits": 8, "likelihood": "logistic_mixture", "image_channels": 3}),
    ("nvae", {"likelihood": "bernoulli"}),
    ("nvae", {"likelihood": "bernoulli", "image_channels": 2}),
    ("vdvae", {"bits": 8}),
    ("vdvae", {"bits": 5, "normalized": False}),
    ("evdvae", {"bits": 8}),
    ("evdvae", {"likelihood": "bernoulli"}),
    ("nvae", {"bits": 12, "likelihood": "logistic_mixture", "image_size": [16, 8]}),
    ("nvae", {"bits": 16, "likelihood": "logistic_mixture", "image_channels": 5}),
    ("nvae", {"bits": 16, "likelihood": "logistic_mixture", "image_channels": 3,
              "image_size": [8, 16], "counted_size": [6, 16]}),
    ("nvae", {"bits": 8, "likelihood": "logistic_mixture", "num_classes": 3}),
    ("vdvae", {"bits": 10, "image_size": [8, 24]}),
    ("evdvae", {"bits": 16, "image_channels": 2}),
]  # fmt: skip
MORE = [
    pytest.param(
        family,
        {"likelihood": likelihood, "bits": bits, "image_channels": channels,
         "image_size": size, "num_classes": 2 * (bits % 2)},
        marks=pytest.mark.exhaustive,
    )
    for family in ("nvae", "vdvae", "evdvae")
    for likelihood, bits in (("bernoulli", 1), *(("logistic_mixture", b) for b in range(1, 17)))
    for channels, size in ((1, 8), (2, [8, 16]), (3, [16, 8]), (4, 8))
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes"), CASES + MORE)
def test_round_trip(family, changes):
    """Images are many enough for a chain, and not a multiple of the batch."""
    codec = Codec(model_of(family, **changes), batch_size=3)
    images = images_for(codec, 50)
    with codec._walk.running():
        block, size = encode_block(codec._walk, images)
        assert 0 < size.starters < size.images == 50
        assert torch.equal(decode_block(codec._walk, block), images)
    assert torch.equal(codec.decode(codec.encode(images)), images)


@pytest.mark.parametrize(
    ("batch_size", "block_images"),
    [
        *((1, 50), (7, 9), (64, 9)),
        *(pytest.param(b, n, marks=pytest.mark.exhaustive) for b in range(1, 7) for n in (20, 45)),
    ],
)
def test_batches_and_blocks(batch_size, block_images):
    """Also batches larger than a block, and a last block that is not full."""
    model = model_of("nvae", bits=12, likelihood="logistic_mixture", image_channels=2)
    codec = Codec(model, batch_size=batch_size, block_images=block_images)
    images = images_for(codec, 50)
    assert torch.equal(codec.decode(codec.encode(images)), images)


def test_labels_are_left_out():
    """An archive of a model that knows classes is that of the same model without them."""
    changes = {"bits": 4, "likelihood": "logistic_mixture"}
    knows = model_of("nvae", num_classes=3, **changes)
    other = model_of("nvae", **changes)
    other.load_state_dict({k: v for k, v in knows.state_dict().items() if "classes" not in k})
    codecs = [Codec(model, batch_size=4) for model in (knows, other)]
    images = images_for(codecs[0], 40)
    blocks = []
    for codec in codecs:
        with codec._walk.running():
            blocks.append(encode_block(codec._walk, images)[0])
    assert blocks[0] == blocks[1]


def test_progress_counts_every_image_once(monkeypatch):
    """Starters too, those of a try that ran out of bits, and those of blocks that nobody wants."""
    codec = Codec(model_of("nvae", likelihood="logistic_mixture"), batch_size=3, block_images=30)
    images = images_for(codec, 50)
    push, tries = chain._push_all, []

    def empty_at_first(*arguments):
        passes = push(*arguments)
        tries.append(len(passes))
        if len(tries) == 1:
            raise EmptyStackError
        return passes

    counts = []
    monkeypatch.setattr(chain, "_push_all", empty_at_first)
    with codec._walk.running():
        block, _ = encode_block(codec._walk, images, counts.append)
        assert len(tries) == 2
        assert (sum(counts), min(counts) > 0) == (50, True)
        decode_block(codec._walk, block, counts.append)
    assert sum(counts) == 100
    archive = from_bytes(codec.encode(images))
    walk = codec.walk_for(archive)
    counts.clear()
    (read,) = codec.read(archive, walk, lambda numbers: 40 in numbers, counts.append)
    assert len(read[2]) == 20
    assert sum(counts) == 50


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_few_images(count, batch_size):
    codec = Codec(model_of("nvae", likelihood="logistic_mixture"), batch_size=batch_size)
    images = images_for(codec, count)
    assert torch.equal(codec.decode(codec.encode(images)), images)


@pytest.mark.parametrize("bits", [8, 16])
def test_values_at_random(bits):
    """No level is impossible, however unlikely; nothing here is like what a model could learn."""
    codec = Codec(model_of("nvae", likelihood="logistic_mixture", image_channels=3, bits=bits))
    images = torch.randint(0, 2**bits, (40, *codec.image_shape), dtype=level_type(bits))
    assert torch.equal(codec.decode(codec.encode(images)), images)


def test_a_model_that_is_sure_and_wrong():
    """Pixels at the floor of the scales, latents far outside the prior's reach."""
    model = model_of("vdvae", bits=8)
    with torch.no_grad():
        model.image_head.bias[10:].fill_(-20.0)
        for layer in model.groups:
            layer.prior.convs[-1].bias[4:8].fill_(-12.0)  # sigma of the prior
    codec = Codec(model, batch_size=4)
    images = images_for(codec, 30)
    assert torch.equal(codec.decode(codec.encode(images)), images)


def test_the_decoder_takes_the_archives_settings():
    model = model_of("nvae", likelihood="logistic_mixture")
    codec = Codec(model, batch_size=5, precision="float64", block_images=20)
    images = images_for(codec, 45)
    assert torch.equal(Codec(model, batch_size=2).decode(codec.encode(images)), images)


def test_the_model_is_left_alone():
    """Its mode, gradients and threads; and layout and mode do not matter."""
    model = model_of("nvae", likelihood="logistic_mixture").train()
    threads = torch.get_num_threads()
    codec = Codec(model)
    data = codec.encode(images_for(codec, 20))
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.get_num_threads() == threads
    Codec(model.eval().to(memory_format=torch.channels_last)).decode(data)


def test_the_number_of_threads_is_the_settings():
    threads = torch.get_num_threads()
    walk = Walk(model_of("vdvae"), PassSettings(threads=threads + 1))
    with walk.running():
        assert torch.get_num_threads() == threads + 1
    assert torch.get_num_threads() == threads


def test_bits_do_not_depend_on_what_ran_before():
    model = model_of("evdvae")
    codec = Codec(model)
    images = images_for(codec, 30)
    first = codec.encode(images)
    codec.encode(images.flip(0))
    assert codec.encode(images) == first == Codec(model).encode(images)


def test_stacks_that_run_dry_are_filled_again(monkeypatch):
    """The draw is estimated from a few images; others may need more."""
    monkeypatch.setattr(chain, "_SLACK", 0.0)
    codec = Codec(model_of("nvae", likelihood="logistic_mixture"), batch_size=4)
    images = images_for(codec, 60)
    images[16:] = 0
    tried = []
    whole = chain._starters
    monkeypatch.setattr(chain, "_starters", lambda *a: tried.append(a[1]) or whole(*a))
    assert torch.equal(codec.decode(codec.encode(images)), images)
    assert len(tried) > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("nvae", {"likelihood": "logistic_mixture", "image_channels": 3}),
        pytest.param("vdvae", {"bits": 12, "image_size": [8, 16]}, marks=pytest.mark.exhaustive),
        pytest.param("evdvae", {"likelihood": "bernoulli"}, marks=pytest.mark.exhaustive),
    ],
)
def test_two_processes(tmp_path, family, changes):
    """A fresh process decodes; a third one that computes otherwise refuses, in one line."""
    model = model_of(family, **changes)
    save_model(model, tmp_path / "model.ckpt")
    encode = (
        "import sys, torch\nfrom nvae.checkpoint import load_model\n"
        "from nvae.codec.codec import Codec\n"
        "codec = Codec(load_model(sys.argv[1] + '/model.ckpt'), batch_size=4)\n"
    )
    decode = encode + (
        "data = open(sys.argv[1] + '/a.nvae', 'rb').read()\n"
        "try:\n    images = codec.decode(data)\n"
        "except ValueError as error:\n    sys.exit(str(error))\n"
        "torch.save(images, sys.argv[1] + '/restored.pt')\n"
    )
    codec = Codec(model)
    images = images_for(codec, 40)
    torch.save(images, tmp_path / "images.pt")
    encode += (
        "images = torch.load(sys.argv[1] + '/images.pt')\n"
        "open(sys.argv[1] + '/a.nvae', 'wb').write(codec.encode(images))\n"
    )

    def run(script: str, **environment: str) -> str:
        import os

        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True,
            env=os.environ | environment,
        )  # fmt: skip
        return done.stderr

    assert run(encode) == ""
    assert run(decode) == ""
    assert torch.equal(torch.load(tmp_path / "restored.pt"), images)
    error = run(decode, ATEN_CPU_CAPABILITY="default")
    assert "processor" in error
    assert error.count("\n") == 1


def test_other_weights_are_refused():
    model = model_of("nvae", likelihood="logistic_mixture")
    codec = Codec(model, checkpoint="best.ckpt")
    data = codec.encode(images_for(codec, 20))
    with pytest.raises(ArchiveError, match=r"another model: nvae \w{12} \(best.ckpt\)"):
        Codec(nudged(model)).decode(data)


def test_other_numbers_give_an_error_and_no_pixels(monkeypatch):
    """What an unlike processor would do: the weights pass for the same and are not."""
    model = model_of("nvae", likelihood="logistic_mixture")
    other = model_of("nvae", likelihood="logistic_mixture")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.001)
    codec = Codec(model, batch_size=4)
    data = codec.encode(images_for(codec, 40))
    wrong = Codec(other, batch_size=4)
    wrong._sha256 = codec._sha256
    with pytest.raises(ArchiveError, match="nothing of it is given out"):
        wrong.decode(data)


def test_another_processor_is_refused_or_tried(monkeypatch):
    codec = Codec(model_of("nvae", likelihood="logistic_mixture"))
    images = images_for(codec, 20)
    data = codec.encode(images)
    monkeypatch.setattr("nvae.codec.codec.processor", lambda: "abacus")
    with pytest.raises(ArchiveError, match="here it is abacus"):
        codec.decode(data)
    assert torch.equal(codec.decode(data, try_anyway=True), images)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"likelihood": "normal"}, "no masses"),
        ({"likelihood": "logistic_mixture", "num_flows": 1}, "num_flows=0"),
    ],
)
def test_models_that_cannot_be_coded(changes, line):
    with pytest.raises(ValueError, match=line):
        Codec(model_of("nvae", **changes))


def test_a_strangers_model_needs_the_hook():
    with pytest.raises(ValueError, match="takes no choose="):
        Codec(TwoGroups(TwoGroupsConfig()))


@pytest.mark.parametrize(
    ("images", "line"),
    [
        (torch.zeros(2, 1, 8, 8), "uint8"),
        (torch.zeros(0, 1, 8, 8, dtype=torch.uint8), "at least 1"),
        (torch.zeros(2, 1, 8, 9, dtype=torch.uint8), r"\(1, 8, 8\)"),
        (torch.full((2, 1, 8, 8), 16, dtype=torch.uint8), "level 16; the model codes 0 to 15"),
    ],
)
def test_images_that_do_not_fit(images, line):
    codec = Codec(model_of("nvae", likelihood="logistic_mixture", bits=4))
    with pytest.raises(ValueError, match=line):
        codec.encode(images)


@pytest.mark.parametrize(
    ("images", "line"),
    [
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "of torch.int32 is needed"),
        (
            torch.full((2, 1, 8, 8), 4096, dtype=torch.int32),
            "level 4096; the model codes 0 to 4095",
        ),
        (torch.full((2, 1, 8, 8), -1, dtype=torch.int32), "level -1"),
    ],
)
def test_deep_images_that_do_not_fit(images, line):
    codec = Codec(model_of("nvae", likelihood="logistic_mixture", bits=12))
    with pytest.raises(ValueError, match=line):
        codec.encode(images)


def test_images_that_are_too_large(monkeypatch):
    monkeypatch.setattr("nvae.codec.codec.LARGEST_BLOCK", 63)
    with pytest.raises(ValueError, match=r"\(1, 8, 8\) have more than the 63 values"):
        Codec(model_of("nvae", likelihood="logistic_mixture"))


@pytest.mark.parametrize(
    "settings", [{"batch_size": 0}, {"threads": 0}, {"precision": "half"}, {"block_images": 0}]
)
def test_impossible_settings(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Codec(model_of("nvae", likelihood="logistic_mixture"), **settings)


@pytest.mark.parametrize("family", ["nvae", "vdvae", "evdvae"])
def test_the_hook_walks_as_always(family):
    """Given the posteriors' own draws, every bit of the walk is the usual walk's."""
    model = model_of(family, likelihood="logistic_mixture")
    x = torch.rand(3, 1, 8, 8)
    noise = model.draw_noise(3)
    with torch.inference_mode():
        maps = model.encode(x)
        state, usual = model.top_down(noise, encoder_maps=maps)
        chosen, groups = model.top_down(
            noise, encoder_maps=maps, choose=lambda g, _, posterior: posterior.sample(noise[g])
        )
        again, priors = model.top_down(noise, choose=lambda g, _p, _q: usual[g].z)
    assert torch.equal(chosen, state)
    assert torch.equal(again, state)
    for a, b, c in zip(usual, groups, priors, strict=True):
        assert torch.equal(a.kl, b.kl)
        assert torch.equal(a.prior.mean, c.prior.mean)
        assert c.posterior is None


def test_padding_and_companions_change_no_bit():
    """A row's numbers do not depend on the rows beside it: what decoding rests on."""
    walk = Walk(model_of("nvae", likelihood="logistic_mixture"), PassSettings(batch_size=4))
    levels = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    with walk.running():
        together = walk.model.encode(walk.input(levels))
        alone = walk.model.encode(walk.input(levels[:1]))
    assert all(torch.equal(a[:1], b[:1]) for a, b in zip(together, alone, strict=True))
