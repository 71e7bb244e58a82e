"""Networks that turn images into features: Inception as published, or one's own.

The Inception network and its resizing are torch-fidelity's port of the TensorFlow graph that FID
was defined with; other ports give other numbers.
"""

import hashlib
import importlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn

INCEPTION_SHA256 = "6726825d"
"""How the SHA-256 of the published weights begins; torch-fidelity's file name states it."""


@dataclass(frozen=True)
class FeatureExtractor:
    """Images to features.

    Attributes:
        name: for protocols: network, weights and resizing.
        function: ``(B, C, H, W)`` uint8 to features ``(B, D)``, or to a pair of features and class
            logits ``(B, classes)``.
        colour: the function takes three channels; grey images are repeated.
    """

    name: str
    function: Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]
    colour: bool

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features ``(B, D)`` and logits or None of images ``(B, C, H, W)`` in [0, 1].

        Raises:
            ValueError: the function gives something else.
        """
        pixels = images.clamp(0, 1).mul(255).round().to(torch.uint8)
        if self.colour and pixels.shape[1] == 1:
            pixels = pixels.expand(-1, 3, -1, -1)
        found = self.function(pixels)
        features, logits = found if isinstance(found, tuple) else (found, None)
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            raise ValueError(
                f"feature extractor {self.name} must give (B, D) features, not "
                f"{tuple(features.shape) if isinstance(features, Tensor) else type(features)}"
            )
        return features.float(), logits


def pixels(images: Tensor) -> Tensor:
    """The image itself as its features, ``(B, C * H * W)`` in [0, 1].

    For images too small for Inception: `feature_extractor=nvae.metrics.extractors:pixels`.
    """
    return images.float().flatten(1) / 255


def load_extractor(
    attribute: str | None = None,
    *,
    weights: Path | None = None,
    sha256: str | None = None,
    device: torch.device | str = "cpu",
) -> FeatureExtractor:
    """The extractor named ``module:attribute``, or Inception.

    Args:
        attribute: of an importable module: a function or network as in
            :attr:`FeatureExtractor.function`, or a class that makes one without arguments.
        weights: file with Inception's weights; None downloads them once.
        sha256: how the file's SHA-256 must begin; None: as that of the published weights.
        device: where networks run.

    Raises:
        ValueError: no such attribute, no network, or a file with another checksum.
    """
    if attribute is not None:
        return _own(attribute, torch.device(device))
    return _inception(weights or _download(), sha256 or INCEPTION_SHA256, torch.device(device))


def _own(attribute: str, device: torch.device) -> FeatureExtractor:
    module_name, colon, name = attribute.partition(":")
    if not (module_name and colon and name):
        raise ValueError(f"feature_extractor={attribute} must be written module:attribute")
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, name)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise ValueError(f"feature_extractor={attribute} cannot be imported: {error}") from None
    if isinstance(function, type):
        function = function()
    if not callable(function):
        raise ValueError(f"feature_extractor={attribute} is not callable")
    if isinstance(function, nn.Module):
        function = function.to(device).eval()
    return FeatureExtractor(f"{attribute} {_fingerprint(module, function)}", function, colour=False)


def _fingerprint(module: ModuleType, function: Any) -> str:
    """Of a user's source file and weights: features kept for other ones must not be compared."""
    digest = hashlib.sha256()
    if file := getattr(module, "__file__", None):
        digest.update(Path(file).read_bytes())
    if isinstance(function, nn.Module):
        for name, tensor in function.state_dict().items():
            raw = tensor.cpu().reshape(-1).view(torch.uint8)
            digest.update(name.encode() + raw.numpy().tobytes())
    return digest.hexdigest()[:12]


def _download() -> Path:
    """Fetch the published weights once into torch's own cache."""
    module = _fidelity_module()
    url = module.URL_INCEPTION_V3
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=INCEPTION_SHA256, progress=False)
    except (URLError, OSError, RuntimeError) as error:
        raise ValueError(
            f"Inception's weights cannot be downloaded ({error}); fetch {url} elsewhere and give "
            f"inception_weights=FILE, or put it at {path}"
        ) from None
    return path


def _inception(path: Path, sha256: str, device: torch.device) -> FeatureExtractor:
    module = _fidelity_module()
    if not path.is_file():
        raise ValueError(f"no Inception weights at {path}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(sha256.lower()):
        raise ValueError(
            f"{path} has SHA-256 {found}, expected {sha256}...; it is damaged or another file "
            "(inception_sha256=... accepts one knowingly)"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        # torch-fidelity unpickles what it is given; it gets a copy that holds tensors only
        with tempfile.TemporaryDirectory() as folder:
            plain = Path(folder) / "inception.pth"
            torch.save(state, plain)
            network = module.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], str(plain)
            )
    except Exception as error:  # torch raises almost anything on a file of another kind
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} holds no Inception weights: {reason}") from None
    name = f"torch-fidelity inception-v3-compat 2048 {found[:8]}"
    return FeatureExtractor(name, network.to(device), colour=True)


def _fidelity_module():  # type: ignore[no-untyped-def]
    try:
        return importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except ImportError:
        raise ValueError(
            "these metrics need the package torch-fidelity: pip install torch-fidelity"
        ) from None
