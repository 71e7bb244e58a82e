"""Checkpoints and exported folders that are damaged, or made to do harm.

Whatever happens to a file, either the true weights come out of it or one clear line does.
"""

import argparse
import copy
import io
import itertools
import json
import os
import pickle
import random
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nvae.checkpoint import (
    CheckpointError,
    describe,
    load_model,
    save_checkpoint,
    save_model,
    write_weights,
)
from nvae.command_line import LONGEST_MESSAGE
from nvae.models import NVAE, ModelConfig
from nvae.torch_file import TorchFileError, inspect_torch_file
from tests.models.small import small_model
from tests.reference import checkpoint_path

QUICK, LONG = 40, 700


@pytest.fixture(scope="module")
def model() -> NVAE:
    torch.manual_seed(1)
    return small_model(num_flows=1).eval()


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load_model(path)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) <= LONGEST_MESSAGE + len(str(path))
    assert "weights_only" not in message
    return message


def true_or_refused(path: Path, model: NVAE) -> bool:
    """Whether it was refused; what loads must be the true model."""
    try:
        found = load_model(path)
    except CheckpointError:
        return bool(refused(path))
    assert found.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    return False


def flipped(content: bytes, seed: int) -> bytes:
    """One bit turned over, anywhere."""
    position = random.Random(seed).randrange(8 * len(content))
    damaged = bytearray(content)
    damaged[position // 8] ^= 1 << position % 8
    return bytes(damaged)


def _attempts(path: Path, model: NVAE, seeds: range, target: Path | None = None) -> int:
    target = target or path
    content = target.read_bytes()
    count = 0
    for seed in seeds:
        target.write_bytes(flipped(content, seed))
        count += true_or_refused(path, model)
    return count


def test_flipped_bits_never_give_wrong_weights(tmp_path: Path, model: NVAE) -> None:
    path = tmp_path / "model.ckpt"
    save_model(model, path, {"name": "a"})
    assert _attempts(path, model, range(QUICK)) > QUICK // 2


@pytest.mark.exhaustive
def test_many_flipped_bits(tmp_path: Path, model: NVAE) -> None:
    path = tmp_path / "model.ckpt"
    save_model(model, path, {"name": "a"})
    assert _attempts(path, model, range(1000, 1000 + LONG)) > LONG // 2


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
@pytest.mark.parametrize(
    "seeds", [range(QUICK), pytest.param(range(1000, 1000 + LONG), marks=pytest.mark.exhaustive)]
)
def test_flipped_bits_in_a_folder(tmp_path: Path, model: NVAE, file: str, seeds: range) -> None:
    """The checksum in the JSON covers both files."""
    write_weights(model, tmp_path)
    # white space and the spelling of a key that is not ours may change; nothing else
    assert _attempts(tmp_path, model, seeds, tmp_path / file) > len(seeds) // 2


@pytest.mark.parametrize("kept", [0, 1, 30, 0.1, 0.5, 0.9, 0.999])
def test_truncated_files(tmp_path: Path, model: NVAE, kept: float) -> None:
    path = tmp_path / "model.ckpt"
    save_model(model, path)
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    refused(path)


def rewritten(
    source: Path, target: Path, change: Callable[[str, bytes], bytes], packed: bool = False
) -> None:
    """The same archive with other records; its checksums are right."""
    kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", kind) as new:
        for info in old.infolist():
            new.writestr(info.filename, change(info.filename, old.read(info)))


def test_a_packed_archive_is_refused(tmp_path: Path, model: NVAE) -> None:
    """torch maps the packed bytes as if they were plain."""
    save_model(model, tmp_path / "plain.ckpt")
    rewritten(tmp_path / "plain.ckpt", tmp_path / "model.ckpt", lambda _, b: b, packed=True)
    assert "is packed" in refused(tmp_path / "model.ckpt")


@pytest.mark.parametrize("bytes_left", [0, 4])
def test_a_storage_that_is_cut_is_refused(tmp_path: Path, model: NVAE, bytes_left: int) -> None:
    """torch reads on into the next record."""
    save_model(model, tmp_path / "whole.ckpt")
    rewritten(
        tmp_path / "whole.ckpt", tmp_path / "model.ckpt",
        lambda name, b: b[:bytes_left] if name.endswith("data/1") else b,
    )  # fmt: skip
    assert "not as long as its tensors" in refused(tmp_path / "model.ckpt")


def _with_pickle(tmp_path: Path, content: bytes, records: dict[str, bytes] | None = None) -> Path:
    path = tmp_path / "made.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/version", b"3\n")
        for name, record in (records or {}).items():
            archive.writestr(f"archive/{name}", record)
    return path


class _Persistent(pickle.Pickler):
    """Writes tensors as torch does, with sizes that need not be true."""

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, _Claim):
            return "storage", torch.FloatStorage, value.key, "cpu", value.numel
        return None


class _Claim:
    def __init__(self, key: str, numel: Any) -> None:
        self.key, self.numel = key, numel


class _Tensor:
    def __init__(self, claim: _Claim, *view: Any) -> None:
        self.claim, self.view = claim, view

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, (self.claim, *self.view, False, {})


def _claiming(tmp_path: Path, *view: Any, numel: Any = 4, stored: int = 4) -> Path:
    buffer = io.BytesIO()
    content = {"nvae_format": 1, "model_config": {}, "state_dict": {
        "model.initial_state": _Tensor(_Claim("0", numel), *view)}}  # fmt: skip
    _Persistent(buffer, protocol=2).dump(content)
    return _with_pickle(tmp_path, buffer.getvalue(), {"data/0": bytes(4 * stored)})


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (
            (0, (4,), (1,)),
            "tensors or more",
        ),  # nothing is wrong with this one but its configuration
        ((0, (5,), (1,)), "leads out of"),
        ((1, (4,), (1,)), "leads out of"),
        ((0, (2, 3), (2, 1)), "leads out of"),
        ((0, (10**12,), (1,)), "leads out of"),
        ((0, (10**30,), (0,)), "tensors or more|damaged"),
        ((-1, (4,), (1,)), "impossible"),
        ((0, (-4,), (1,)), "impossible"),
        ((0, (4,), (-1,)), "impossible"),
        ((0, (4,), (1, 1)), "impossible"),
        ((0, (4.0,), (1,)), "impossible"),
        ((0, None, (1,)), "damaged"),
    ],
)
def test_what_a_tensor_claims_is_checked(tmp_path: Path, view: Any, message: str) -> None:
    path = _claiming(tmp_path, *view)
    with pytest.raises(CheckpointError, match=message):
        load_model(path)
    refused(path)


@pytest.mark.parametrize("numel", [10**12, -4, 4.5, None, "4", [4]])
def test_what_a_storage_claims_is_checked(tmp_path: Path, numel: Any) -> None:
    assert "damaged" in refused(_claiming(tmp_path, 0, (4,), (1,), numel=numel))


def _nested(opening: bytes, closing: bytes, depth: int) -> bytes:
    """A pickle of one value inside another, as a value of a dictionary."""
    return b"\x80\x02}X\x01\x00\x00\x00a" + opening * depth + closing * depth + b"s."


@pytest.mark.parametrize(
    "content",
    [
        _nested(b"]", b"a", 100_000)[:-3] + b"s.",
        b"\x80\x02}" + b")" + b"\x85" * 200_000 + b"Ns.",  # a key: hashing it recurses in C
        b"\x80\x02]q\x00h\x00a.",  # a list that holds itself
        b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",  # a dictionary that holds itself
        b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",  # two gigabytes of zeros
        b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.",
        b"\x80\x02(i__builtin__\neval\n.",
        b"\x80\x02\x82\x01.",  # an extension code
        b"\x80\x05\x8c\x02os\x8c\x06system\x93.",
        b"\x80\x02\x8b\xff\xff\xff\x7f",  # an integer of two gigabytes
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xff}.",
        b"garbage",
        b"",
    ],
)  # fmt: skip
def test_pickles_made_to_do_harm(tmp_path: Path, content: bytes) -> None:
    refused(_with_pickle(tmp_path, content))


def test_nothing_is_larger_than_the_file(tmp_path: Path) -> None:
    """A packed pickle of 1 GB, and a claim of 4 TB, in a process that may have 4 GB in all."""
    with (
        zipfile.ZipFile(tmp_path / "packed.ckpt", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("archive/data.pkl", "w") as file,
    ):
        for _ in range(1024):
            file.write(bytes(1 << 20))
    claiming = _claiming(tmp_path, 0, (10**12,), (0,), numel=10**12)
    script = (
        "import sys\nfrom nvae.checkpoint import CheckpointError, load_model\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n        load_model(path)\n"
        "    except CheckpointError as error:\n        print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "packed.ckpt"), str(claiming)],
        capture_output=True, text=True, check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (1 << 32, 1 << 32)),
    )  # fmt: skip
    assert "is packed" in done.stdout
    assert "not as long as its tensors" in done.stdout


FEW = (None, [], "x", 10**30)
WRONG = (*FEW, {}, -1, 1.5, float("nan"), True, {"a": [1]})
few_or_all = pytest.mark.parametrize(
    "values", [FEW, pytest.param(WRONG, marks=[pytest.mark.slow, pytest.mark.exhaustive])]
)


def _content(model: NVAE) -> dict[str, Any]:
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    return {**describe(model, {"data": {"name": "random"}}), "state_dict": state}


def _confused(
    content: dict[str, Any], values: tuple[Any, ...]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every entry replaced by values of other types, and left out."""
    places = [(content, key) for key in content]
    places += [(content["model_config"], key) for key in content["model_config"]]
    places += [(content["state_dict"], key) for key in list(content["state_dict"])[:2]]
    for holder, key in places:
        before = holder[key]
        for value in values:
            if type(value) is type(before) and value == before:
                continue
            holder[key] = value
            yield f"{key}={value!r}", content
        del holder[key]
        yield f"without {key}", content
        holder[key] = before


@few_or_all
def test_values_of_other_types(tmp_path: Path, model: NVAE, values: tuple[Any, ...]) -> None:
    """Every key of the file: either it does not matter, or one line says what is wrong."""
    path = tmp_path / "model.ckpt"
    harmless = []
    for what, content in _confused(copy.copy(_content(model)), values):
        save_checkpoint(content, path)
        try:
            load_model(path)
            harmless.append(what)
        except CheckpointError:
            refused(path)
    # a run's configuration matters to no weight; a setting left out takes its default
    assert {name.removeprefix("without ").split("=")[0] for name in harmless} <= {
        "run_config", "model", *describe(model)["model_config"]
    }  # fmt: skip
    assert not [name for name in harmless if "nan" in name and "run_config" not in name]


@pytest.mark.parametrize("keys", [{0: torch.zeros(2)}, {("a",): torch.zeros(2)}, [1], "text"])
def test_a_state_that_is_none(tmp_path: Path, model: NVAE, keys: Any) -> None:
    content = {**describe(model), "state_dict": keys}
    torch.save(content, tmp_path / "model.ckpt")
    refused(tmp_path / "model.ckpt")


@pytest.mark.parametrize(
    "setting",
    [
        {"groups_per_scale": 10**6}, {"groups_per_scale": 1000}, {"preprocess_cells": 10**7},
        {"preprocess_cells": 100}, {"image_size": 2**14}, {"image_size": 2**40},
        {"decoder_channels": 10**5}, {"decoder_channels": 4096}, {"num_flows": 10**9},
        {"num_mixtures": 10**9}, {"latent_channels": 10**9}, {"num_scales": 1000},
        {"bits": 10**6}, {"preprocess_blocks": 63},
    ],
)  # fmt: skip
def test_absurd_networks_are_not_made(
    tmp_path: Path, model: NVAE, setting: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is compared with the weights has no storage: nothing is made on the CPU."""
    content = _content(model)
    content["model_config"] |= setting
    save_checkpoint(content, tmp_path / "model.ckpt")
    build = NVAE.__init__

    def on_meta(self: NVAE, config: ModelConfig) -> None:
        assert torch.get_default_device().type == "meta"
        build(self, config)

    monkeypatch.setattr(NVAE, "__init__", on_meta)
    refused(tmp_path / "model.ckpt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_weights_that_are_no_numbers(tmp_path: Path, value: float, kind: str) -> None:
    """The first tensor is named."""
    model = small_model()
    names = [name for name, tensor in model.state_dict().items() if tensor.is_floating_point()]
    with torch.no_grad():
        for name in names[5:]:
            model.state_dict()[name].view(-1)[0] = value
    path = tmp_path if kind == "folder" else tmp_path / "model.ckpt"
    write_weights(model, path) if kind == "folder" else save_model(model, path)
    assert f"its {names[5]!r} holds numbers that are not finite" in refused(path)


@few_or_all
def test_published_arguments_of_other_types(tmp_path: Path, values: tuple[Any, ...]) -> None:
    whole = torch.load(checkpoint_path("mnist"), weights_only=False)
    for key, value in itertools.product(vars(whole["args"]), values):
        args = argparse.Namespace(**{**vars(whole["args"]), key: value})
        torch.save({**whole, "args": args}, tmp_path / "model.ckpt")
        try:
            load_model(tmp_path / "model.ckpt")
        except CheckpointError:
            refused(tmp_path / "model.ckpt")


def test_a_folders_configuration_of_other_types(tmp_path: Path, model: NVAE) -> None:
    write_weights(model, tmp_path)
    whole = json.loads((tmp_path / "config.json").read_text())
    for key, value in itertools.product(whole, WRONG):
        (tmp_path / "config.json").write_text(json.dumps({**whole, key: value}))
        if value is None and key in ("sha256", "counted_size"):
            continue
        if whole[key] != value or type(whole[key]) is not type(value):
            refused(tmp_path)


@pytest.mark.parametrize("text", ["", "[", "[1]", "null", "{" * 100_000, '{"a":' * 100_000, "\xff"])
def test_a_folders_configuration_that_is_none(tmp_path: Path, model: NVAE, text: str) -> None:
    write_weights(model, tmp_path)
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    refused(tmp_path)


def test_folders_of_earlier_versions_still_load(tmp_path: Path, model: NVAE) -> None:
    write_weights(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["sha256"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not true_or_refused(tmp_path, model)


def test_pipes_and_devices(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.ckpt")
    for path in (tmp_path / "model.ckpt", Path("/dev/zero")):
        assert "no checkpoint at" in refused(path)
        with pytest.raises(TorchFileError, match="no regular file"):
            inspect_torch_file(path)
