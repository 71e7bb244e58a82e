"""Lossless compression by a model beside what everybody has, on a split of the model's data.

    python -m benchmarks.codec runs/digits/checkpoints/best.ckpt
    python -m benchmarks.codec CHECKPOINT --batch 32 --json benchmarks/results/codec.json

Prints Markdown: bits/dim and speed of every codec on the counted pixels of the same images, all
restored and compared; the code length beside the negative ELBO; what one image alone costs; what
the latents' lattice costs against the closed-form KL; and the network's share of the time. The
other codecs are given one picture an image, as files would be, and all images below each other in
one, which no folder does.
"""

import argparse
import cProfile
import io
import lzma
import pstats
import time
import zlib
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from nvae.cli.checkpoint_data import choose_data, open_checkpoint, open_data
from nvae.cli.common import keep_freed_memory, versions
from nvae.codec import Codec, latents
from nvae.codec.chain import BlockSize
from nvae.codec.fingerprint import processor
from nvae.codec.latents import Lattice, fitting
from nvae.codec.pixels import bits_a_pixel, window
from nvae.data.dataset import ImageBatch
from nvae.evaluation import evaluate
from nvae.files import write_json
from nvae.models import HierarchicalVAE
from nvae.models.distributions import Normal
from nvae.models.output import GroupSample
from nvae.random import latent_noise

Coded = Callable[[NDArray[np.uint8]], bytes]
Restored = Callable[[bytes, tuple[int, ...]], NDArray[np.uint8]]
_CODING = ("pop_gaussian", "push_gaussian", "pop_bits", "push_bits")
_PIXELS = ("push_pixels", "pop_pixels")
_LATENTS = ("pop_posterior", "push_posterior", "push_prior", "pop_prior")


def main() -> None:
    """Print the tables."""
    options = _arguments()
    keep_freed_memory()
    opened = open_checkpoint(options.checkpoint, options.weights)
    data = open_data(choose_data({}, opened.run_config), opened.model.config)
    count = min(options.images or len(data.split(options.split)), len(data.split(options.split)))
    x = torch.cat([batch.x for batch in data.batches(options.split)])[:count]
    levels = _levels(opened.model, x)
    codec = Codec(opened.model, batch_size=options.batch, threads=options.threads)
    facts: dict[str, Any] = {
        "checkpoint": options.checkpoint, "split": options.split, "images": count,
        "batch": options.batch, "threads": options.threads, "processor": processor(),
        "versions": versions(torch.device("cpu")),
    }  # fmt: skip
    torch.set_num_threads(options.threads)
    facts["negative_elbo"] = _negative_elbo(opened.model, x, options.draws)
    facts["codec"], restored = _ours(codec, levels)
    assert torch.equal(restored, levels)
    facts["share"] = _profile(codec, levels[: options.profiled])
    facts["lattice"] = lattice_costs(opened.model, x[: options.lattice], options.steps)
    facts["others"] = [] if options.alone else list(_others(levels))
    print(_markdown(facts))
    if options.json:
        write_json(options.json, facts)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--split", default="test")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema")
    parser.add_argument("--images", type=int, help="the first so many; default: all")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--draws", type=int, default=1, help="of the negative ELBO")
    parser.add_argument("--profiled", type=int, default=256, help="images profiled")
    parser.add_argument("--lattice", type=int, default=256, help="images the lattice is tried on")
    parser.add_argument(
        "--steps", type=float, nargs="*", default=[0.5, 1.0, latents.STEPS_A_SIGMA, 8.0],
        help="least lattice steps in a sigma of the posterior, to compare",
    )  # fmt: skip
    parser.add_argument("--alone", action="store_true", help="leave the other codecs out")
    parser.add_argument("--json", help="file for the numbers")
    return parser.parse_args()


def _levels(model: HierarchicalVAE, x: Tensor) -> Tensor:
    inside = window(model.config)
    white = 2 ** bits_a_pixel(model.config) - 1
    return (x[..., inside, inside] * white).round().to(torch.uint8).contiguous()


def _negative_elbo(model: HierarchicalVAE, x: Tensor, draws: int) -> dict[str, float]:
    found = evaluate(model, [ImageBatch(x, torch.arange(len(x)))], elbo_samples=draws)
    bits = found.negative_elbo_bits_per_dim
    return {"bits_per_dim": bits.mean, "sem": bits.standard_error, "dims": found.dimensions}


def _ours(codec: Codec, levels: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Sizes and speeds of one archive, and the images that came back."""
    dims = levels[0].numel()
    buffer = io.BytesIO()
    start = time.perf_counter()
    sizes: list[BlockSize] = list(
        codec.write(buffer, len(levels), iter(levels.split(codec.block_images)))
    )
    middle = time.perf_counter()
    restored = codec.decode(buffer.getvalue())
    end = time.perf_counter()
    chained = sum(size.images - size.starters for size in sizes)
    net = sum(size.chain_bits for size in sizes)
    first = max(size.first_draw_bits for size in sizes)
    return {
        "file_bits_per_dim": 8 * len(buffer.getvalue()) / (len(levels) * dims),
        "net_bits_per_dim": net / max(1, chained) / dims,
        "chained_images": chained,
        "starters": sum(size.starters for size in sizes),
        "starter_bits": sum(size.starter_bits for size in sizes),
        "first_draw_bits": first,
        "alone_bits_per_dim": (first + net / max(1, chained)) / dims,
        "encode_images_per_s": len(levels) / (middle - start),
        "decode_images_per_s": len(levels) / (end - middle),
    }, restored


def _profile(codec: Codec, levels: Tensor) -> dict[str, dict[str, float]]:
    """Shares of the time: network, pixels' and latents' distributions, entropy coder."""
    shares = {}
    data = codec.encode(levels)  # also the first pass, which folds weights
    works: dict[str, Callable[[], object]] = {
        "encode": lambda: codec.encode(levels),
        "decode": lambda: codec.decode(data),
    }
    for name, work in works.items():
        profile = cProfile.Profile()
        profile.runcall(work)
        spent: dict[str, float] = {}
        stats: Any = pstats.Stats(profile)
        for (file, _, function), (_, _, _, cumulative, _) in stats.stats.items():
            if "codec" in file:
                spent[function] = spent.get(function, 0.0) + cumulative
        total = stats.total_tt
        coder = sum(spent.get(each, 0.0) for each in _CODING)
        around = sum(spent.get(each, 0.0) for each in (*_PIXELS, *_LATENTS)) - coder
        passes = spent["push"] if name == "encode" else spent["pop"]
        shares[name] = {
            "network": (passes - around - coder) / total,
            "distributions": around / total,
            "entropy coder": coder / total,
            "rest": (total - passes) / total,
        }
    return shares


@torch.inference_mode()
def lattice_costs(
    model: HierarchicalVAE, x: Tensor, steps: Sequence[float]
) -> dict[str, dict[str, float]]:
    """What coding latents on the lattice adds to the negative ELBO, in percent of it.

    Both from the same noise, a draw and its nearest lattice point: log Q - log P of the point's
    masses against log q - log p of the draw's densities, and the pixels' log-likelihood at both.

    Args:
        model: in evaluation.
        x: images ``(N, C, H, W)``.
        steps: least lattice steps in a sigma of the posterior.

    Returns:
        For every number of steps the ``percent``, its standard error ``sem``, and ``draw_bits``,
        what a draw takes from the stack.
    """
    found = {}
    for number in steps:
        differences, exact, bits = [], [], 0.0
        for batch in x.split(64):
            noise = latent_noise(torch.arange(len(batch)), model.latent_shapes, model.dtype)
            maps = model.encode(batch)
            state, groups = model.top_down(noise, encoder_maps=maps)
            elbo = model.likelihood(model.decode_state(state)).log_prob(batch).double()
            elbo = elbo - torch.stack([_log_ratio(g).flatten(1).sum(1) for g in groups]).sum(0)
            lattices = fitting(groups, number)
            bits = max(bits, float(latents.bits_to_draw(groups, lattices).mean()))
            rounded = _Rounded(lattices, noise)
            state, _ = model.top_down(noise, encoder_maps=maps, choose=rounded)
            coded = model.likelihood(model.decode_state(state)).log_prob(batch).double()
            differences.append(elbo - (coded - rounded.log_ratio))
            exact.append(-elbo)
        difference, total = torch.cat(differences), torch.cat(exact).mean()
        found[f"{number:g}"] = {
            "percent": float(100 * difference.mean() / total),
            "sem": float(100 * difference.std() / len(difference) ** 0.5 / total),
            "draw_bits": bits,
        }
    return found


def _log_ratio(group: GroupSample) -> Tensor:
    """log q - log p of the draw, ``(B, L, h, w)`` float64."""
    return group.log_q.double() - group.log_p.double()


class _Rounded:
    """Takes the lattice point that is nearest to the posterior's draw."""

    def __init__(self, lattices: Sequence[Lattice], noise: Sequence[Tensor]) -> None:
        self.lattices, self.noise = lattices, noise
        self.log_ratio: Tensor = torch.zeros(())

    def __call__(self, group: int, prior: Normal, posterior: Normal | None) -> Tensor:
        assert posterior is not None
        lattice = self.lattices[group]
        mean, std = (
            torch.from_numpy(each).view(prior.mean.shape)
            for each in lattice.under_posterior(prior, posterior)
        )
        k = (mean + std * self.noise[group].double()).round().clamp(-lattice.limit, lattice.limit)
        ratio = _log_mass(k, mean, std) - _log_mass(k, torch.zeros_like(k), lattice.scale)
        self.log_ratio = self.log_ratio + ratio.flatten(1).sum(1)
        return lattice.z(k.to(torch.int32), prior)


def _log_mass(k: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log of a Normal's mass within half a step of k, from the side where nothing cancels."""
    away = (k - mean).abs() / std
    half = 0.5 / std
    mass = torch.special.ndtr(half - away) - torch.special.ndtr(-half - away)
    return mass.clamp(min=2.0**-24).log()


def _others(levels: Tensor) -> list[dict[str, Any]]:
    """Sizes and speeds of the codecs that are installed."""
    images = levels.movedim(1, -1).numpy()
    if images.shape[-1] not in (1, 3):
        return []
    return [
        {
            "name": name,
            "one_an_image": _measured(list(images), encode, decode),
            "all_in_one": _measured(
                [images.reshape(-1, *images.shape[2:])], encode, decode
            ) if fits(images) else None,
        }
        for name, encode, decode, fits in _codecs()
    ]  # fmt: skip


def _measured(
    pictures: Sequence[NDArray[np.uint8]], encode: Coded, decode: Restored
) -> dict[str, float]:
    start = time.perf_counter()
    coded = [encode(picture) for picture in pictures]
    middle = time.perf_counter()
    restored = [decode(c, p.shape) for c, p in zip(coded, pictures, strict=True)]
    end = time.perf_counter()
    for picture, back in zip(pictures, restored, strict=True):
        assert (back == picture).all()
    dims = sum(picture.size for picture in pictures)
    return {
        "bits_per_dim": 8 * sum(map(len, coded)) / dims,
        "encode_dims_per_s": dims / (middle - start),
        "decode_dims_per_s": dims / (end - middle),
    }


def _codecs() -> list[tuple[str, Coded, Restored, Callable[[NDArray[np.uint8]], bool]]]:
    def pillow(kind: str, **options: Any) -> tuple[Coded, Restored]:
        def encode(pixels: NDArray[np.uint8]) -> bytes:
            buffer = io.BytesIO()
            picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
            picture.save(buffer, kind, **options)
            return buffer.getvalue()

        def decode(data: bytes, shape: tuple[int, ...]) -> NDArray[np.uint8]:
            found = np.asarray(Image.open(io.BytesIO(data)))
            return found.reshape(*found.shape[:2], -1)[:, :, : shape[2]]

        return encode, decode

    def plain(compress: Callable[[bytes], bytes], inflate: Callable[[bytes], bytes]) -> Any:
        return (
            lambda pixels: compress(pixels.tobytes()),
            lambda data, shape: np.frombuffer(inflate(data), np.uint8).reshape(shape),
        )

    def always(images: NDArray[np.uint8]) -> bool:
        return True

    def below_16384(images: NDArray[np.uint8]) -> bool:
        return images.shape[0] * images.shape[1] < 16384

    found: list[Any] = [
        ("PNG, optimized", *pillow("PNG", optimize=True), always),
        ("WebP, lossless", *pillow("WEBP", lossless=True, quality=100, method=6), below_16384),
        ("zlib, level 9", *plain(lambda b: zlib.compress(b, 9), zlib.decompress), always),
        ("xz, preset 9e", *plain(
            lambda b: lzma.compress(b, preset=9 | lzma.PRESET_EXTREME), lzma.decompress), always),
    ]  # fmt: skip
    if find_spec("pillow_jxl"):  # pip install pillow-jxl-plugin
        __import__("pillow_jxl")
        found.insert(2, ("JPEG XL, effort 9", *pillow("JXL", lossless=True, effort=9), always))
    return found


def _markdown(facts: dict[str, Any]) -> str:
    ours, elbo = facts["codec"], facts["negative_elbo"]["bits_per_dim"]
    lines = [
        f"{facts['images']} images of split={facts['split']}, {facts['checkpoint']}, batch "
        f"{facts['batch']}, {facts['threads']} threads, torch {facts['versions']['torch']}",
        "",
        "| | bits/dim | |",
        "|---|---|---|",
        f"| negative ELBO | {elbo:.4f} | |",
        f"| net, {ours['chained_images']} images in chains | {ours['net_bits_per_dim']:.4f} | "
        f"{100 * (ours['net_bits_per_dim'] / elbo - 1):+.2f} % |",
        f"| the whole file | {ours['file_bits_per_dim']:.4f} | "
        f"{100 * (ours['file_bits_per_dim'] / elbo - 1):+.2f} % |",
        f"| one image alone, by bits-back | {ours['alone_bits_per_dim']:.4f} | "
        f"{ours['first_draw_bits']:,.0f} bits for its first draw |",
        "",
        "| | bits/dim, one an image | all in one | encode, decode, M dim/s |",
        "|---|---|---|---|",
    ]
    dims = facts["negative_elbo"]["dims"]
    speed = [ours[f"{way}_images_per_s"] * dims / 1e6 for way in ("encode", "decode")]
    lines.append(f"| nvae | | {ours['file_bits_per_dim']:.4f} | {speed[0]:.4f}, {speed[1]:.4f} |")
    for other in facts["others"]:
        one, whole = other["one_an_image"], other["all_in_one"]
        together = f"{whole['bits_per_dim']:.4f}" if whole else ""
        lines.append(
            f"| {other['name']} | {one['bits_per_dim']:.4f} | {together} | "
            f"{one['encode_dims_per_s'] / 1e6:.3g}, {one['decode_dims_per_s'] / 1e6:.3g} |"
        )
    lines += ["", "| share of the time | network | distributions | entropy coder | rest |"]
    lines += ["|---|---|---|---|---|"]
    for way, share in facts["share"].items():
        lines.append(f"| {way} | " + " | ".join(f"{100 * v:.0f} %" for v in share.values()) + " |")
    lines += ["", "| lattice steps a sigma | adds to the negative ELBO | bits of one draw |"]
    lines += ["|---|---|---|"]
    for steps, cost in facts["lattice"].items():
        lines.append(
            f"| {steps} | {cost['percent']:+.4f} +- {cost['sem']:.4f} % | "
            f"{cost['draw_bits']:,.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
