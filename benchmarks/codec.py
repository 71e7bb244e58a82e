"""Lossless compression by a model beside what everybody has, on a split of the model's data.

    python -m benchmarks.codec runs/digits/checkpoints/best.ckpt
    python -m benchmarks.codec CHECKPOINT --batch 32 --json benchmarks/results/codec.json

Prints Markdown: bits/dim and speed of every codec on the counted pixels of the same images, all
restored and compared; the code length beside the negative ELBO; what one image alone costs; what
the latents' lattice costs against the closed-form KL; and the network's share of the time. The
other codecs are given one picture an image, as files would be, and all images below each other in
one, which no folder does. Speeds and shares are of CPU time, which a busy machine moves less.

Every part is written to the file of --json as soon as it is measured. Stopped? The same command
goes on; what the file holds of the same settings is not measured again.
"""

import argparse
import cProfile
import io
import pstats
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.picture_codecs import installed, measured
from nvae.cli.checkpoint_data import choose_data, open_checkpoint, open_data
from nvae.cli.common import keep_freed_memory, versions
from nvae.codec import latents
from nvae.codec.chain import BlockSize
from nvae.codec.codec import Codec
from nvae.codec.fingerprint import model_sha256, processor
from nvae.codec.latents import Lattice, fitting
from nvae.codec.pixels import levels_of
from nvae.command_line import fail
from nvae.data.config import SPLITS
from nvae.data.dataset import ImageBatch
from nvae.evaluation import evaluate
from nvae.files import read_json, write_json
from nvae.models import HierarchicalVAE
from nvae.models.distributions import Normal
from nvae.models.output import GroupSample
from nvae.random import latent_noise

_AT_ONCE = 64
_CODING = ("pop_gaussian", "push_gaussian", "pop_bits", "push_bits")
_PIXELS = ("push_pixels", "pop_pixels")
_LATENTS = ("pop_posterior", "push_posterior", "push_prior", "pop_prior")


def main() -> None:
    """Print the tables."""
    options = _arguments()
    keep_freed_memory()
    given = {} if options.data_root is None else {"root": options.data_root}
    try:
        opened = open_checkpoint(options.checkpoint, options.weights)
        data = open_data(choose_data(given, opened.run_config), opened.model.config)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise fail(error) from None
    count = min(options.images or len(data.split(options.split)), len(data.split(options.split)))
    x = torch.cat([batch.x for batch in data.batches(options.split)])[:count]
    levels = levels_of(opened.model.config, x)
    codec = Codec(opened.model, batch_size=options.batch, threads=options.threads)
    parts = _Parts(options.json, {
        "checkpoint": opened.file.name, "weights": model_sha256(opened.model),
        "data": data.config.name, "split": options.split, "images": count, "batch": options.batch,
        "threads": options.threads, "draws": options.draws, "archive": options.archive or count,
        "processor": processor(),
        "versions": versions(torch.device("cpu")) | {"pillow": version("pillow")},
    })  # fmt: skip
    torch.set_num_threads(options.threads)
    parts.measure("negative_elbo", lambda: _negative_elbo(opened.model, x, options.draws))
    for start in range(0, count, options.archive or count):
        some = levels[start : start + (options.archive or count)]
        parts.measure(f"archive {start}", partial(_ours, codec, some))
    parts.measure("share", lambda: _profile(codec, levels[: options.profiled]))
    parts.measure(
        "lattice", lambda: lattice_costs(opened.model, x[: options.lattice], options.steps)
    )
    images = levels.movedim(1, -1).contiguous().numpy()
    images = images if images.dtype == np.uint8 else images.astype(np.uint16)
    for name, encode, decode in () if options.alone else installed(images):
        parts.measure(name, partial(measured, images, encode, decode))
    print(_markdown(parts.settings, parts.found))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--data-root", help="folder of the data set, if not the configured one")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema")
    parser.add_argument("--images", type=int, help="the first so many; default: all")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument(
        "--archive", type=int, help="images of an archive, each a part; default: all in one"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--draws", type=int, default=1, help="of the negative ELBO")
    parser.add_argument("--profiled", type=int, default=256, help="images profiled")
    parser.add_argument("--lattice", type=int, default=256, help="images the lattice is tried on")
    parser.add_argument(
        "--steps", type=float, nargs="*", default=[0.5, 1.0, latents.STEPS_A_SIGMA, 8.0],
        help="least lattice steps in a sigma of the posterior, to compare",
    )  # fmt: skip
    parser.add_argument("--alone", action="store_true", help="leave the other codecs out")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    return parser.parse_args()


class _Parts:
    """What was measured, kept at once.

    Args:
        path: of the file, or None.
        settings: that all of it belongs to; a file of others is begun anew.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.settings, self._path = settings, path
        self.found: dict[str, Any] = {}
        if path is not None and path.exists():
            kept = read_json(path)
            if kept.get("settings") == settings:
                self.found = kept["parts"]

    def measure(self, name: str, work: Callable[[], Any]) -> None:
        """Unless it is there."""
        if name in self.found:
            return
        start = time.process_time()
        self.found[name] = work()
        spent = time.process_time() - start
        print(f"{name}: {spent:.0f} s of CPU time", file=sys.stderr, flush=True)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, {"settings": self.settings, "parts": self.found})


def _negative_elbo(model: HierarchicalVAE, x: Tensor, draws: int) -> dict[str, float]:
    index = torch.arange(len(x))
    batches = [ImageBatch(x[rows], rows) for rows in index.split(_AT_ONCE)]
    found = evaluate(model, batches, elbo_samples=draws)
    bits = found.negative_elbo_bits_per_dim
    return {"bits_per_dim": bits.mean, "sem": bits.standard_error, "dims": found.dimensions}


def _ours(codec: Codec, levels: Tensor) -> dict[str, float]:
    """Sizes and CPU time of one archive, all of whose images come back."""
    start = time.process_time()
    buffer = io.BytesIO()
    sizes: list[BlockSize] = list(
        codec.write(buffer, len(levels), iter(levels.split(codec.block_images)))
    )
    middle = time.process_time()
    restored = codec.decode(buffer.getvalue())
    end = time.process_time()
    assert torch.equal(restored, levels)
    return {
        "images": len(levels),
        "bytes": len(buffer.getvalue()),
        "chained_images": sum(size.images - size.starters for size in sizes),
        "chain_bits": sum(size.chain_bits for size in sizes),
        "starter_bits": sum(size.starter_bits for size in sizes),
        "first_draw_bits": max(size.first_draw_bits for size in sizes),
        "encode_s": middle - start,
        "decode_s": end - middle,
    }


def _together(archives: Sequence[dict[str, float]], dims: int) -> dict[str, float]:
    """What the table says of all archives; ``dims`` of an image."""
    images, chained, net, coded, encode, decode = (
        sum(archive[key] for archive in archives)
        for key in ("images", "chained_images", "chain_bits", "bytes", "encode_s", "decode_s")
    )
    first = max(archive["first_draw_bits"] for archive in archives)
    return {
        "chained_images": chained,
        "first_draw_bits": first,
        "net_bits_per_dim": net / max(1, chained) / dims,
        "file_bits_per_dim": 8 * coded / images / dims,
        "alone_bits_per_dim": (first + net / max(1, chained)) / dims,
        "encode_dims_per_s": images * dims / encode,
        "decode_dims_per_s": images * dims / decode,
    }


def _profile(codec: Codec, levels: Tensor) -> dict[str, dict[str, float]]:
    """Shares of the time: network, pixels' and latents' distributions, entropy coder."""
    shares = {}
    data = codec.encode(levels)  # also the first pass, which folds weights
    works: dict[str, Callable[[], object]] = {
        "encode": lambda: codec.encode(levels),
        "decode": lambda: codec.decode(data),
    }
    for name, work in works.items():
        profile = cProfile.Profile(time.process_time)
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
        for batch in x.split(_AT_ONCE):
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


def _markdown(settings: dict[str, Any], found: dict[str, Any]) -> str:
    elbo, dims = found["negative_elbo"]["bits_per_dim"], found["negative_elbo"]["dims"]
    archives = [part for name, part in found.items() if name.startswith("archive ")]
    ours = _together(archives, dims)
    lines = [
        f"{settings['images']} images of {settings['data']}, split={settings['split']}, "
        f"batch {settings['batch']}, {settings['threads']} threads",
        "",
        "| | bits/dim | |",
        "|---|---|---|",
        f"| negative ELBO | {elbo:.4f} | |",
        f"| net, {ours['chained_images']:.0f} images in chains | {ours['net_bits_per_dim']:.4f} | "
        f"{100 * (ours['net_bits_per_dim'] / elbo - 1):+.2f} % |",
        f"| the whole file | {ours['file_bits_per_dim']:.4f} | "
        f"{100 * (ours['file_bits_per_dim'] / elbo - 1):+.2f} % |",
        f"| one image alone, by bits-back | {ours['alone_bits_per_dim']:.4f} | "
        f"{ours['first_draw_bits']:,.0f} bits for its first draw |",
        "",
        "| | bits/dim, one an image | all in one | encode, decode, M dim/CPU s |",
        "|---|---|---|---|",
    ]
    speed = [ours[f"{way}_dims_per_s"] / 1e6 for way in ("encode", "decode")]
    lines.append(f"| nvae | | {ours['file_bits_per_dim']:.4f} | {speed[0]:.4f}, {speed[1]:.4f} |")
    for name, other in found.items():
        if "one_an_image" not in other:
            continue
        one, whole = other["one_an_image"], other["all_in_one"]
        together = f"{whole['bits_per_dim']:.4f}" if whole else ""
        lines.append(
            f"| {name} | {one['bits_per_dim']:.4f} | {together} | "
            f"{one['encode_dims_per_s'] / 1e6:.3g}, {one['decode_dims_per_s'] / 1e6:.3g} |"
        )
    lines += ["", "| share of the time | network | distributions | entropy coder | rest |"]
    lines += ["|---|---|---|---|---|"]
    for way, share in found["share"].items():
        lines.append(f"| {way} | " + " | ".join(f"{100 * v:.0f} %" for v in share.values()) + " |")
    lines += ["", "| lattice steps a sigma | adds to the negative ELBO | bits of one draw |"]
    lines += ["|---|---|---|"]
    for steps, cost in found["lattice"].items():
        lines.append(
            f"| {steps} | {cost['percent']:+.4f} +- {cost['sem']:.4f} % | "
            f"{cost['draw_bits']:,.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
