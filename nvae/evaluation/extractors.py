"""Networks that turn images into features: Inception as published, or one's own.

The Inception network and its resizing are torch-fidelity's port of the TensorFlow graph that FID
was defined with; other ports give other numbers. Its weights are fetched, checked and read here:
torch-fidelity unpickles whatever file it is given.
"""

import hashlib
import importlib
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
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
        color: the function takes three channels; gray images are repeated. Of pixels with more
            than 8 bits it sees the upper 8.
    """

    name: str
    function: Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]
    color: bool

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features ``(B, D)`` and logits or None of images ``(B, C, H, W)`` in [0, 1].

        Raises:
            ValueError: the function gives something else.
        """
        pixels = images.clamp(0, 1).mul(255).round().to(torch.uint8)
        if self.color and pixels.shape[1] == 1:
            pixels = pixels.expand(-1, 3, -1, -1)
        if self.color and pixels.shape[1] != 3:
            raise ValueError(
                f"feature extractor {self.name} takes gray or color images, not "
                f"{pixels.shape[1]} channels; feature_extractor=module:attribute names another"
            )
        try:
            found = self.function(pixels)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise ValueError(f"feature extractor {self.name} failed: {_reason(error)}") from error
        features, logits = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
        features = self._checked("features", features, len(images)).float()
        return features, None if logits is None else self._checked("logits", logits, len(images))

    def _checked(self, kind: str, found: Any, images: int) -> Tensor:
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != images:
            raise ValueError(
                f"feature extractor {self.name} must give (B, D) {kind}, not "
                f"{tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__}"
            )
        if not torch.isfinite(found).all():
            raise ValueError(f"feature extractor {self.name} gives {kind} that are not finite")
        return found


def pixels(images: Tensor) -> Tensor:
    """The image itself as its features, ``(B, C * H * W)`` in [0, 1].

    For images too small for Inception: `feature_extractor=nvae.evaluation.extractors:pixels`.
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
            :attr:`FeatureExtractor.function`, or a class that makes one without arguments. See
            :func:`_may_be_called` for what it must be; importing the module runs its code.
        weights: file with Inception's weights; None downloads them once.
        sha256: how the file's SHA-256 must begin; None: as that of the published weights.
        device: where networks run.

    Raises:
        ValueError: no such attribute, none that may be called, or a file with another checksum.
    """
    if attribute is not None:
        return _own(attribute, torch.device(device))
    return _inception(weights or _download(), sha256 or INCEPTION_SHA256, torch.device(device))


def _own(attribute: str, device: torch.device) -> FeatureExtractor:
    given = f"feature_extractor={attribute}"
    named = re.fullmatch(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*):([^\W\d]\w*)", attribute)
    if named is None:
        raise ValueError(f"{given} must be written module:attribute")
    module_name, name = named.groups()
    if module_name.partition(".")[0] in sys.stdlib_module_names:
        raise ValueError(f"{given}: {module_name} is a module of Python's own; {_ALLOWED}")
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, name)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{given} cannot be imported: {_reason(error)}") from None
    if not _may_be_called(function, module_name):
        raise ValueError(f"{given} is not what may be called; {_ALLOWED}")
    try:
        if isinstance(function, type):
            function = function()
        if isinstance(function, nn.Module):
            function = function.to(device).eval()
        described = f"{attribute} {_fingerprint(module, function)}"
    except torch.OutOfMemoryError:
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(f"{given} cannot be made: {_reason(error)}") from None
    return FeatureExtractor(described, function, color=False)


_ALLOWED = (
    "allowed: a torch.nn.Module, or a function or a class with __call__ that is defined in that "
    "very module, no part of Python itself"
)


def _may_be_called(found: Any, module: str) -> bool:
    """Whether it is a network or its class, or else a function or callable of that very module.

    What a module has merely imported, such as ``os.system``, is none of its own.
    """
    kind = found if isinstance(found, type) else type(found)
    if issubclass(kind, nn.Module):
        return True
    if isinstance(found, FunctionType):
        return found.__module__ == module
    calls = any("__call__" in vars(each) for each in kind.__mro__)
    return kind.__module__ == module and calls


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _fingerprint(module: ModuleType, function: Any) -> str:
    """A hash of a user's source file and weights: kept features are compared with no others."""
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
        # torch-fidelity gets a copy that holds tensors only
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
    return FeatureExtractor(name, network.to(device), color=True)


def _fidelity_module():  # type: ignore[no-untyped-def]
    try:
        return importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except ImportError:
        raise ValueError(
            "these metrics need the package torch-fidelity: pip install torch-fidelity"
        ) from None
