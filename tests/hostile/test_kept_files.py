"""What the commands keep beside a checkpoint and read again: results, manifests, arrays.

They may be damaged, or come with a stranger's checkpoint. Whatever is in them, either it is what
was written or one clear line says that it is not, and nothing foreign is overwritten.
"""

import contextlib
import io
import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nvae.bn_recalibration import (
    RecalibrationError,
    RecalibrationSettings,
    load_statistics,
    recalibrate,
    save_statistics,
)
from nvae.checkpoint import CheckpointError, save_model
from nvae.cli.evaluate import main as evaluate_main
from nvae.cli.evaluation_run import already_done
from nvae.cli.sample import main as sample_main
from nvae.cli.sample_folder import SampleFolder
from nvae.evaluation import RecordStore, evaluate
from nvae.evaluation.extractors import load_extractor
from nvae.evaluation.features import image_features, reference_features, reference_path
from nvae.evaluation.result import ImageRecords
from nvae.export.__main__ import main as export_main
from nvae.export.folder import export
from nvae.export.sampler import Sampler, largest_difference
from nvae.files import read_arrays
from nvae.models import NVAE
from nvae.pictures import View
from tests.cli.checkpoints import write_checkpoint
from tests.cli.commands import Commands
from tests.hostile.test_reports import VALUES, confused, places
from tests.sampling.models import small_nvae

QUICK, LONG = 60, 2000
PROTOCOL = {"data": "a"}


def _model() -> NVAE:
    return small_nvae()


def _settings(model: NVAE) -> RecalibrationSettings:
    return RecalibrationSettings((0.7,) * len(model.groups), 1, 4)


class _Records:
    """A store of finished images."""

    name = "partial/rank0.npz"

    @staticmethod
    def write(folder: Path, model: NVAE) -> None:
        store = RecordStore(folder / "partial", "p")
        n = np.arange(5)
        kl, bounds = np.ones((5, len(model.groups), 2)), np.ones((5, 2))
        store.add(ImageRecords(n.astype(np.int64), n * 1.0, kl, bounds, bounds))
        store.save()

    @staticmethod
    def read(folder: Path, model: NVAE) -> bytes:
        store = RecordStore(folder / "partial", "p")
        store.check_shapes(len(model.groups), 2, 2)
        found = store.records
        assert found is not None
        return b"".join(np.ascontiguousarray(v).tobytes() for v in vars(found).values())


class _Reference:
    """Features of data images."""

    name = reference_path(Path(), PROTOCOL).name

    @staticmethod
    def _features(folder: Path, calls: list[int]) -> Any:
        def compute() -> Any:
            calls.append(1)
            images = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
            pixels = load_extractor("nvae.evaluation.extractors:pixels")
            return image_features([images], pixels, keep=True)

        return reference_features(folder, PROTOCOL, compute, keep=True)

    @classmethod
    def write(cls, folder: Path, _model: NVAE) -> None:
        cls._features(folder, [])

    @classmethod
    def read(cls, folder: Path, _model: NVAE) -> bytes:
        found = cls._features(folder, [])
        parts = (found.moments.total, found.moments.outer, found.features)
        return b"".join(part.numpy().tobytes() for part in parts)


class _Statistics:
    """Recalibrated statistics."""

    name = "bn.npz"

    @classmethod
    def write(cls, folder: Path, model: NVAE) -> None:
        save_statistics(recalibrate(model, _settings(model)), folder / cls.name)

    @classmethod
    def read(cls, folder: Path, model: NVAE) -> bytes:
        found = load_statistics(folder / cls.name, _settings(model), model)
        if found is None:  # of another network: they are taken anew
            found = recalibrate(model, _settings(model))
        parts = {**found.mean, **{f"v{k}": v for k, v in found.variance.items()}}
        return b"".join(parts[name].numpy().tobytes() for name in sorted(parts))


KINDS = [_Records, _Reference, _Statistics]


@pytest.fixture(scope="module")
def model() -> NVAE:
    return _model()


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def kept(request, model, tmp_path_factory) -> tuple[Any, Path, bytes]:
    folder = tmp_path_factory.mktemp("kept")
    request.param.write(folder, model)
    return request.param, folder, request.param.read(folder, model)


def _attempt(kept: tuple[Any, Path, bytes], model: NVAE, content: bytes) -> bool:
    """Whether a changed file is refused; what is read must be what was written."""
    kind, folder, expected = kept
    path = folder / kind.name
    whole = path.read_bytes()
    path.write_bytes(content)
    found, error = _read(kind, folder, model)
    path.write_bytes(whole)
    assert found == expected or "delete it" in error
    return bool(error)


def _read(kind: Any, folder: Path, model: NVAE) -> tuple[bytes, str]:
    """What is read, or the error's line."""
    try:
        return kind.read(folder, model), ""
    except ValueError as error:
        return b"", str(error)


def _flips(kept: Any, model: NVAE, count: int) -> int:
    kind, folder, _ = kept
    whole = (folder / kind.name).read_bytes()
    refused = 0
    for seed in range(count):
        position = random.Random(seed).randrange(8 * len(whole))
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        refused += _attempt(kept, model, bytes(damaged))
    return refused


def test_a_flipped_bit_is_never_a_wrong_number(kept, model):
    assert _flips(kept, model, QUICK) > QUICK // 2


@pytest.mark.slow
def test_a_flipped_bit_is_never_a_wrong_number_long(kept, model):
    assert _flips(kept, model, LONG) > LONG // 2


def test_files_that_are_cut_or_none_are_refused(kept, model):
    kind, folder, _ = kept
    whole = (folder / kind.name).read_bytes()
    for content in (b"", b"PK", b"junk" * 100, *(whole[: len(whole) * i // 10] for i in range(10))):
        assert _attempt(kept, model, content)


def _npz(arrays: dict[str, Any], pack: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", pack) as archive:
        for name, value in arrays.items():
            data = io.BytesIO()
            np.save(data, np.asarray(value), allow_pickle=True)
            archive.writestr(f"{name}.npy", data.getvalue())
    return buffer.getvalue()


@pytest.mark.parametrize(
    "other",
    [lambda a: np.full_like(a, np.nan), lambda a: np.full_like(a, np.inf), lambda a: a[..., :1],
     lambda a: a.astype(np.float16), lambda a: a[None], lambda a: a.ravel()[:0],
     lambda a: np.array("text"), lambda a: np.array([None, {}], dtype=object),
     lambda a: np.float64(-1), lambda a: -np.ones_like(a)],
    ids=["nan", "inf", "sliced", "half", "deeper", "empty", "text", "objects", "number", "minus"],
)  # fmt: skip
def test_arrays_of_other_kinds_are_refused_or_of_another_protocol(kept, model, other):
    """Every array of the file in turn. -1 everywhere may be true of some, and is read as such."""
    kind, folder, _ = kept
    path = folder / kind.name
    whole, arrays = path.read_bytes(), read_arrays(path)
    for name, value in arrays.items():
        numeric = value.dtype.kind == "f"
        changed = {**arrays, name: other(value if numeric else np.zeros(3))}
        path.write_bytes(_npz(changed))
        _, error = _read(kind, folder, model)
        path.write_bytes(whole)
        if not error:
            harmless = np.array_equal(changed[name], value) or np.all(changed[name] == -1)
            assert harmless or not numeric, name


def _header(shape: str, kind: str = "<f8") -> bytes:
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    "data",
    [_header("(1099511627776,)"), _header("(4294967296, 4294967296, 4294967296)"), _header("(-1,)"),
     _header("(0, -1)"), _header("(3,)") + b"\0" * 23, _header("(3,)") + b"\0" * 25,
     _header("(3,)", "|O"), _header("(3,)", "V0"), _header("[3]"), _header("(1e9,)"), b"",
     b"\x93NUMPY\x03\x00" + b"\xff" * 8],
)  # fmt: skip
def test_headers_are_not_believed(tmp_path, data):
    """Eight bytes of shape can ask for terabytes."""
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a.npy", data)
    with pytest.raises(ValueError, match="damaged or no npz file"):
        read_arrays(tmp_path / "x.npz")


def test_what_inflates_beyond_its_bound_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    path.write_bytes(_npz({"a": np.zeros(1 << 21)}, zipfile.ZIP_DEFLATED))
    assert len(path.read_bytes()) < 1 << 16
    with pytest.raises(ValueError, match="more than 1048576 bytes"):
        read_arrays(path, 1 << 20)


@pytest.mark.parametrize("way", ["pipe", "folder", "device"])
def test_only_regular_files_are_read(tmp_path, way):
    path = tmp_path / "x.npz"
    if way == "pipe":
        os.mkfifo(path)
    elif way == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="no regular file"):
        read_arrays(path)


def test_records_of_another_model_or_split_are_refused(tmp_path, model):
    _Records.write(tmp_path, model)
    store = RecordStore(tmp_path / "partial", "p")
    with pytest.raises(ValueError, match="another model; delete it"):
        evaluate(model, [], store=store)


def test_statistics_of_other_norms_are_refused(tmp_path, model):
    _Statistics.write(tmp_path, model)
    path = tmp_path / _Statistics.name
    arrays = read_arrays(path)
    name = next(key for key in arrays if key.startswith("mean/"))
    for changed in ({}, {"mean/nonsense": arrays[name], "variance/nonsense": arrays[name]}):
        others = {k: v for k, v in arrays.items() if k != name}
        path.write_bytes(_npz({**others, **changed}))
        with pytest.raises(RecalibrationError, match="delete it"):
            load_statistics(path, _settings(model), model)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "model.ckpt")
    return tmp_path


def test_a_samples_manifest_of_any_type_is_somebody_elses(folder):
    request = {"mode": "prior", "seeds": [1, 2]}
    (folder / "out").mkdir()
    manifest = {"request": request, "complete": True, "files": ["a.png"]}
    texts = [json.dumps(confused(manifest, place, other), default=str)
             for place in places(manifest) for other in VALUES]  # fmt: skip
    texts += ["", "[" * 100_000, "1" * 10_000, "\0"]
    for text in texts:
        (folder / "out" / "manifest.json").write_text(text, errors="surrogatepass")
        try:
            SampleFolder(folder / "out", request, overwrite=False, view=View())
        except ValueError:
            continue
        assert json.loads(text)["request"] == request


def test_a_result_of_any_type_is_somebody_elses(tmp_path):
    protocol, path = {"seed": 0}, tmp_path / "r.json"
    whole = {"result": {}, "protocol": protocol}
    texts = [
        json.dumps(confused(whole, place, other)) for place in places(whole) for other in VALUES
    ]
    for text in (*texts, "[" * 100_000, "", "{", "1" * 10_000):
        path.write_text(text)
        try:
            already_done(path, protocol, overwrite=False)
        except ValueError:
            continue
        assert json.loads(text)["protocol"] == protocol
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="overwrite=true"):
        already_done(path, protocol, overwrite=False)


@pytest.mark.parametrize("command", ["evaluate", "sample"])
@pytest.mark.parametrize("value", [[], "x", {"data": []}, {"data": {"name": []}, 1: 2}])
def test_a_run_config_of_any_type(folder, monkeypatch, capsys, value, command):
    torch.manual_seed(0)
    save_model(small_nvae(), folder / "odd.ckpt", value)
    main = evaluate_main if command == "evaluate" else sample_main
    run = Commands(main, monkeypatch, capsys, folder)
    mode = ["mode=reconstruct"] if command == "sample" else []
    error = run.fails("checkpoint=odd.ckpt", *mode)
    assert "give data=NAME" in error or "run_config is no dictionary" in error
    with contextlib.suppress(CheckpointError):
        export(folder / "odd.ckpt", folder / "exported", with_sampler=False)


def test_a_card_holds_no_markup_of_a_stranger(folder):
    hostile = "<b>|[x](http://x)![y](z)`*_\n# h " + "x" * 100_000
    save_model(small_nvae(), folder / "odd.ckpt", {"name": hostile, "data": {"name": hostile}})
    export(folder / "odd.ckpt", folder / "exported", with_sampler=False)
    card = (folder / "exported" / "README.md").read_text()
    assert len(card) < 5000
    for text in ("<b>", "[x](", "![y]", "\n# h"):
        assert text not in card


def test_export_refuses_pictures_that_are_not_finite(tmp_path, monkeypatch, capsys):
    """It said "agrees to 0e+00": the largest of 0 and NaN is 0."""
    model = small_nvae()
    sampler = Sampler(model)

    def broken(*arguments: Any) -> torch.Tensor:
        return sampler(*arguments) * torch.nan

    with pytest.raises(FloatingPointError, match="program's pictures"):
        largest_difference(sampler, broken)
    with torch.no_grad():
        sampler.model.initial_state.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="model's pictures"):
        largest_difference(sampler, sampler)
    with torch.no_grad():
        model.initial_state.fill_(torch.nan)
    save_model(model, tmp_path / "nan.ckpt")
    with pytest.raises(CheckpointError, match="initial_state"):
        export(tmp_path / "nan.ckpt", tmp_path / "out")
    run = Commands(export_main, monkeypatch, capsys, tmp_path)
    run.fails("nan.ckpt", "--to", "out")
    assert not (tmp_path / "out").exists()


def test_evaluate_refuses_images_outside_0_to_1():
    model = small_nvae()

    class Batch:
        x = 255 * torch.rand(2, 1, model.config.image_size, model.config.image_size)
        index = torch.arange(2)

    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        evaluate(model, [Batch()])


@pytest.mark.parametrize(
    "change", [lambda c: [c], lambda c: None, lambda c: {"config": c}, lambda c: {**c, "x": 1}]
)
def test_hub_folders_say_nothing_but_the_network(tmp_path, change: Callable[[Any], Any]):
    pytest.importorskip("huggingface_hub")
    from nvae.checkpoint import write_weights
    from nvae.hub import HubNVAE

    write_weights(small_nvae(), tmp_path)
    HubNVAE.from_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(CheckpointError):
        HubNVAE.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")  # a pickle is none
    with pytest.raises(CheckpointError):
        HubNVAE.from_pretrained(tmp_path)
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    with pytest.raises(CheckpointError, match="no exported folder"):
        HubNVAE.from_pretrained(tmp_path)
