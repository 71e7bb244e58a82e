"""What a finished run says about itself: test likelihood, sample and reconstruction grids."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.progress import Progress

from nvae.atomic import write_json
from nvae.data.module import ImageDataModule
from nvae.evaluation import EvaluationResult, evaluate
from nvae.images import save_grids_side_by_side, save_rows
from nvae.models import NVAE
from nvae.modes import eval_mode
from nvae.noise import STREAM_POSTERIOR, keys_of, latent_noise
from nvae.sampling.prior import sample_images


@dataclass
class ReportConfig:
    """The report at the end of training.

    Attributes:
        importance_samples: draws of the importance-weighted bound; 0: no evaluation.
        temperatures: of the latents, one sample grid each.
        samples: pictures in each grid.
        chunk: rows in one pass of the evaluation; bounds the memory.
    """

    importance_samples: int = 100
    temperatures: list[float] = field(default_factory=lambda: [0.4, 0.7, 0.85, 1.0])
    samples: int = 64
    chunk: int = 256

    def __post_init__(self) -> None:
        if self.importance_samples < 0:
            raise ValueError(
                f"report.importance_samples is {self.importance_samples}; it must be at least 0"
            )
        for name in ("samples", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"report.{name} is {getattr(self, name)}; it must be at least 1")
        if not self.temperatures or min(self.temperatures) < 0:
            raise ValueError(
                f"report.temperatures is {list(self.temperatures)}; "
                "it takes one or more numbers, none below 0"
            )


def test_likelihood(
    model: NVAE, data: ImageDataModule, config: ReportConfig, file: Path
) -> EvaluationResult:
    """Evaluate the test images with a progress bar, and write the result to ``file``."""
    with Progress(transient=True) as progress:
        images = len(data.table("test"))
        task = progress.add_task("evaluating", total=images * config.importance_samples)
        result = evaluate(
            model,
            data.batches("test", model.initial_state.device),
            importance_samples=(config.importance_samples,),
            chunk=config.chunk,
            progress=lambda rows: progress.advance(task, rows),
        )
    write_json(file, result.to_dict())
    return result


def sample_grid(model: NVAE, config: ReportConfig, file: Path) -> None:
    """Grids of the same seeds at several temperatures, side by side; the likelihood's means."""
    grids = [
        sample_images(model, range(config.samples), temperature=t, pixel_temperature="mean")
        for t in config.temperatures
    ]
    save_grids_side_by_side(file, grids, [f"temperature {t:g}" for t in config.temperatures])


@torch.inference_mode()
def reconstruction_grid(model: NVAE, data: ImageDataModule, file: Path, columns: int = 16) -> None:
    """Test images above what the model makes of them."""
    batch = next(data.batches("test", model.initial_state.device))
    x, index = batch.x[:columns], batch.index[:columns]
    with eval_mode(model):
        keys = keys_of(index, seed=0, stream=STREAM_POSTERIOR)
        output = model(x, latent_noise(keys, model.latent_shapes))
        reconstruction = model.likelihood(output.logits).mean
    save_rows(file, [x.cpu(), reconstruction.cpu()], ["test image", "reconstruction"])


def likelihood_lines(result: EvaluationResult) -> list[str]:
    """The two figures of a table, in nats and bits/dim."""
    elbo, bits = result.negative_elbo, result.negative_elbo_bits_per_dim
    lines = [f"test negative ELBO  {elbo.mean:.3f} nats  {bits.mean:.4f} bits/dim"]
    lines += [
        f"test NLL (K={bound.samples})  {bound.nll.mean:.3f} nats  "
        f"{bound.bits_per_dim.mean:.4f} bits/dim  (importance-weighted)"
        for bound in result.importance_weighted
    ]
    return lines
