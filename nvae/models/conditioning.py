"""Classes as a condition: what a label adds to the top-down walk, and how to follow it closely.

A label adds a learned vector to the state before every latent group, and nothing where an image
has none. One model so holds p(x | class) and p(x): training drops some labels, and drawing may go
beyond p(x | class), away from p(x) (classifier-free guidance, Ho & Salimans 2022).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

NO_LABEL = -1
"""Of an image whose class is not known, or left out."""


@dataclass(frozen=True)
class Condition:
    """What a top-down walk is given beside noise and latents.

    Attributes:
        rows: classes of the images, ``(B, K)``, as :meth:`ClassEmbedding.rows` has them.
        guidance: see :func:`guided`; where it is not 1 the batch is images with their labels and
            then the same images without.
    """

    rows: Tensor
    guidance: float = 1.0


class ClassEmbedding(nn.Module):
    """One vector a class and latent group, zeros at first.

    Args:
        num_classes: K.
        widths: channels of the state before every group.
    """

    def __init__(self, num_classes: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.groups = nn.ParameterList(torch.zeros(num_classes, width) for width in widths)

    def rows(self, labels: Tensor) -> Tensor:
        """Labels ``(B,)`` as one-hot rows ``(B, K)``; zeros for :data:`NO_LABEL`.

        A product with them has the same gradient on every run, which a lookup on a GPU has not.
        """
        classes = torch.arange(self.num_classes, device=labels.device)
        return (labels[:, None] == classes).to(self.groups[0].dtype)

    def forward(self, state: Tensor, rows: Tensor, group: int) -> Tensor:
        """The state ``(B, C, h, w)`` before a group, with what the classes of :meth:`rows` add."""
        added = (rows @ self.groups[group]).to(state.dtype)
        return state + added[:, :, None, None]


def check_labels(labels: Tensor | None, num_classes: int, batch: int) -> None:
    """Raise a ValueError unless these are labels of a batch for a model of so many classes.

    Their values are looked at on the CPU alone: elsewhere every step would wait for the device.

    Args:
        labels: ``(B,)`` int64, :data:`NO_LABEL` to ``num_classes - 1``; None: no image has one.
        num_classes: 0 where the model knows no classes.
        batch: B.
    """
    if labels is None:
        return
    if not num_classes:
        raise ValueError("labels are given, but the model has no classes (model.num_classes=0)")
    if labels.shape != (batch,) or labels.dtype != torch.int64:
        raise ValueError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}; the model takes "
            f"torch.int64 of shape ({batch},)"
        )
    is_plain = type(labels) is Tensor and labels.device.type == "cpu"
    if is_plain and batch and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in labels.aminmax())
        wrong = low if low < NO_LABEL else high
        if wrong < NO_LABEL or wrong >= num_classes:
            raise ValueError(
                f"label {wrong} is none of the model's classes, 0 to {num_classes - 1}; "
                f"{NO_LABEL} stands for no label"
            )


def guided(parameters: tuple[Tensor, Tensor], weight: float) -> tuple[Tensor, Tensor]:
    """A prior that follows the class more closely, or less.

    The mean moves along the line from the prior without label (weight 0) through that with it
    (weight 1) and on; so does log-sigma, up to weight 1: beyond, it would run away.

    Args:
        parameters: mean and log-sigma, ``(2 B, L, h, w)``: B images with their labels, then the
            same without.
        weight: >= 0.

    Returns:
        The like, equal in both halves.
    """
    if weight == 1:
        return parameters
    mean, log_sigma = parameters
    return _line(mean, weight), _line(log_sigma, min(weight, 1.0))


def _line(parameter: Tensor, weight: float) -> Tensor:
    labeled, unlabeled = parameter.chunk(2)
    return torch.lerp(unlabeled, labeled, weight).repeat(2, 1, 1, 1)
