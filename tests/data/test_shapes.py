"""Images of any height and width, channels and depth, from the files to the batch."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nvae.data.config import DataError, load_config
from nvae.data.conversion import prepare_if_missing
from nvae.data.dataset import ImageData, make_in_memory
from nvae.data.loader import DenseSplit, RaggedSplit
from nvae.data.places import prepared_folder
from nvae.data.prepare import main
from nvae.data.store import read_manifest
from nvae.data.transforms import model_input
from tests.data import files


def scans(bits, shape=(12, 9, 6, 1), seed=0):
    return np.random.default_rng(seed).integers(0, 2**bits, shape).astype(np.uint16)


def arrays(root, images, **overrides):
    (root / "scans").mkdir(exist_ok=True)
    np.save(root / "scans" / "train.npy", images)
    *_, height, width, channels = images.shape
    shape = {"image_size": [height, width], "channels": channels}
    values = {"root": str(root / "scans"), "cache": str(root / "cache"), "batch_size": 4}
    return replace(load_config("arrays"), **(values | shape | overrides))


def opened(config):
    data = ImageData(config)
    data.prepare()
    data.setup()
    return data


def everything(data):
    """(x, stored images) of both splits together, in no order."""
    x = torch.cat([batch.x for split in ("train", "valid") for batch in data.batches(split)])
    stored = [data.split(split).images.numpy() for split in ("train", "valid")]
    return x, np.concatenate(stored)


def rows(images):
    return sorted(image.tobytes() for image in images)


@pytest.mark.parametrize("bits", range(9, 17))
def test_every_level_reaches_the_model_exactly(tmp_path, bits):
    images = scans(bits)
    images.flat[:2] = 0, 2**bits - 1
    data = opened(arrays(tmp_path, images, bits=bits))
    x, stored = everything(data)
    assert rows(stored) == rows(images)
    assert stored.dtype == np.uint16
    wanted = torch.from_numpy(stored.astype(np.float32)) / (2**bits - 1)
    assert torch.equal(x, wanted.permute(0, 3, 1, 2))
    assert torch.equal((x * (2**bits - 1)).round().permute(0, 2, 3, 1).int(), widened(stored))
    assert x.shape[1:] == (1, 9, 6)
    assert x.is_contiguous(memory_format=torch.channels_last)


def widened(stored):
    return torch.from_numpy(stored.astype(np.int32))


@pytest.mark.parametrize("channels", [2, 5, 17])
def test_any_number_of_channels(tmp_path, channels):
    images = files.pictures(12, 8, channels)
    data = opened(arrays(tmp_path, images, flip=True, on_device="never"))
    x, stored = everything(data)
    assert rows(stored) == rows(images)
    assert torch.equal(x, torch.from_numpy(stored).permute(0, 3, 1, 2).float() / 255)
    assert next(iter(data.train_loader())).images.shape == (4, 8, 8, channels)


def test_floats_are_as_they_are(tmp_path):
    images = np.random.default_rng(0).random((12, 4, 10, 2)).astype(np.float32)
    data = opened(arrays(tmp_path, images, floats=True, likelihood="normal"))
    x, stored = everything(data)
    assert rows(stored) == rows(images)
    assert torch.equal(x, torch.from_numpy(stored).permute(0, 3, 1, 2))
    assert x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("options", [{"bits": 12}, {"floats": True, "likelihood": "normal"}])
@pytest.mark.parametrize("on_device", ["always", "never"])
def test_flips_and_borders_of_other_types_are_those_of_bytes(tmp_path, options, on_device):
    """Which image is mirrored depends on its index alone."""
    levels = scans(8)

    def batches(name, images, options):
        (tmp_path / name).mkdir()
        sizes = {"image_size": [13, 10], "pad": 2, "flip": True, "on_device": on_device}
        data = opened(arrays(tmp_path / name, images, **(options | sizes)))
        return [data.to_input(raw) for raw in data.train_loader()]

    given = levels if "bits" in options else (levels / 255).astype(np.float32)
    scale = 255 / 4095 if "bits" in options else 1
    pairs = zip(
        batches("bytes", levels.astype(np.uint8), {}),
        batches("other", given, options),
        strict=True,
    )
    for one, two in pairs:
        assert torch.equal(one.index, two.index)
        assert two.x.shape[2:] == (13, 10)
        torch.testing.assert_close(one.x * scale, two.x)


def test_windows_of_twelve_bits_are_cut_at_random(tmp_path):
    images = scans(12, (12, 9, 20, 1))
    config = arrays(tmp_path, images, bits=12, image_size=[9, 6], crop="random")
    data = opened(config)
    split = data.split("valid")
    assert isinstance(split, RaggedSplit)
    assert split.shape == (9, 6, 1)
    got = split.gather(torch.tensor([0]), epoch=None, seed=0)[0].numpy()
    assert any(np.array_equal(got, image[:, 7:13]) for image in images)
    drawn = data.split("train").gather(torch.tensor([0]), epoch=0, seed=0)[0].numpy()
    whole = [image[:, k : k + 6] for image in images for k in range(15)]
    assert any(np.array_equal(drawn, window) for window in whole)


def test_depths_and_shapes_live_side_by_side(tmp_path):
    images = scans(8)
    names = set()
    for overrides in (
        {"bits": 10},
        {"bits": 12},
        {"floats": True, "likelihood": "normal"},
        {"value_range": [0, 255]},
    ):
        config = arrays(tmp_path, images, **overrides)
        assert len(opened(config).split("train")) == 11
        names.add(prepared_folder(config).name)
    suffixes = ("-10bit", "-12bit", "-float", "")
    assert names == {f"nvae-9x6x1{suffix}-none" for suffix in suffixes}


def test_another_range_than_prepared_is_refused(tmp_path):
    config = arrays(tmp_path, scans(8), value_range=[0, 255])
    opened(config)
    with pytest.raises(DataError, match=r"value_range=\[0, 255\], the config says .*\[0, 511\]"):
        opened(replace(config, value_range=[0, 511]))


def test_the_file_and_what_it_needs_are_named(tmp_path):
    images = scans(12)
    images[3, 0, 0] = 5000
    for overrides, words in (
        ({"bits": 12}, r"3 cannot be used: it has values up to 5000, and data\.bits=12 goes to"),
        ({"bits": 13, "channels": 3}, r"0 cannot .* 1 channel, and data\.channels=3: set .*=1"),
        ({"bits": 13, "image_size": 9}, r"0 cannot .* is 9x6 .*needs 9x9: set data\.image_size"),
        (
            {},
            r"0 cannot .* holds uint16 from .* data\.value_range=\[0, 4095\], or .* data\.bits=12",
        ),
    ):
        with pytest.raises(DataError, match=rf"train\.npy number {words}") as error:
            opened(arrays(tmp_path, images, **overrides))
        assert "\n" not in str(error.value)


def test_pictures_of_sixteen_bits_keep_what_is_asked_for(tmp_path):
    from PIL import Image

    values = scans(16, (10, 8, 8, 1))
    for i, image in enumerate(values):
        Image.fromarray(image[:, :, 0]).save(tmp_path / f"{i}.png")
    config = replace(load_config("folder"), root=str(tmp_path), image_size=8, channels=1)
    for overrides, wanted in (
        ({}, values >> 8),
        ({"bits": 16}, values),
        ({"bits": 12, "value_range": [0, 65535]}, values >> 4),
    ):
        cache = tmp_path / "cache" / str(len(overrides))
        x, stored = everything(opened(replace(config, cache=str(cache), **overrides)))
        assert rows(stored) == rows(wanted.astype(stored.dtype))
        assert x.max() <= 1


@pytest.mark.parametrize("crop", ["center", "random", "none"])
def test_pictures_become_rectangles(tmp_path, crop):
    images = [
        np.random.default_rng(i).integers(0, 256, (30 + i, 40, 3), np.uint8) for i in range(10)
    ]
    for i, image in enumerate(images):
        (tmp_path / f"{i}.png").write_bytes(files.encoded(image))
    config = replace(load_config("folder"), root=str(tmp_path), image_size=[16, 12], crop=crop)
    data = opened(config)
    assert prepared_folder(config).name == f"nvae-16x12x3{'' if crop == 'center' else '-' + crop}"
    assert next(data.batches("valid")).x.shape == (1, 3, 16, 12)
    assert data.to_input(next(iter(data.train_loader()))).x.shape == (9, 3, 16, 12)


def test_the_command_takes_height_and_width(tmp_path, capsys):
    np.save(tmp_path / "scans.npy", scans(12))
    options = ["--size", "9x6", "--channels", "1", "--bits", "12", "--cache", tmp_path / "cache"]
    assert main([str(each) for each in (tmp_path / "scans.npy", *options)]) == 0
    assert "train: 11 images of 9x6x1" in capsys.readouterr().out


def test_counted_windows_may_be_rectangles(make_config):
    config = make_config(image_size=[12, 8], counted_size=[8, 8])
    assert config.counted_size == 8
    assert make_config(image_size=(8, 8)).image_size == 8


def test_a_form_made_before_there_were_labels_and_depths_is_read(tmp_path):
    files.write_pictures(tmp_path / "source", files.pictures(10, 8, 3))
    config = replace(load_config("folder"), root=str(tmp_path), image_size=8)
    before = everything(opened(config))
    path = prepared_folder(config) / "manifest.json"
    content = json.loads(path.read_text())
    content.pop("classes")
    for split in content["splits"].values():
        for key in ("dtype", "labels"):
            split.pop(key)
    path.write_text(json.dumps(content))
    stamp = path.stat().st_mtime_ns
    after = everything(opened(config))
    assert torch.equal(before[0], after[0])
    assert path.stat().st_mtime_ns == stamp


@pytest.mark.parametrize("dtype", ["|u1", "<f4", ">u2", "|O", 3])
def test_a_type_that_is_not_that_of_the_file_is_refused(tmp_path, dtype):
    config = arrays(tmp_path, scans(12), bits=12)
    prepare_if_missing(config)
    path = prepared_folder(config) / "manifest.json"
    content = json.loads(path.read_text())
    content["splits"]["train"]["dtype"] = dtype
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"is damaged|is not valid"):
        ImageData(config).setup()


def test_random_images_have_any_shape_and_depth(make_config):
    deep = make_in_memory(make_config(image_size=[4, 6], channels=5, bits=12))["train"]
    assert deep.shape == (4, 6, 5)
    assert deep.images.dtype == torch.uint16
    assert widened(deep.images.numpy()).max() == 4095
    floats = make_in_memory(make_config(floats=True, likelihood="normal"))["train"].images
    assert floats.dtype == torch.float32
    assert 0 <= floats.min() < 0.01
    assert 0.99 < floats.max() < 1


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"bits": 12}, {"floats": True}])
def test_the_same_input_on_cuda(cuda, make_config, options):
    config = make_config(likelihood="normal", flip=True, pad=2, **options)
    images = make_in_memory(replace(config, train_size=16))["train"]
    index = torch.arange(16)
    here = model_input(images.gather(index, epoch=4, seed=0), index, epoch=4, config=config)
    there = images.to(cuda).gather(index.to(cuda), epoch=4, seed=0)
    there = model_input(there, index.to(cuda), epoch=4, config=config)
    assert torch.equal(here, there.cpu())


def test_gathering_sixteen_bits_takes_rows_in_order():
    images = torch.from_numpy(scans(16, (5, 2, 3, 1)))
    got = DenseSplit(images).gather(torch.tensor([3, 0, 3]), epoch=1, seed=0)
    assert got.dtype == torch.uint16
    assert np.array_equal(got.numpy(), images.numpy()[[3, 0, 3]])


READ_ONLY = """
import os, sys
from dataclasses import replace
from nvae.data.config import load_config
from nvae.data.dataset import ImageData
folder, cache = sys.argv[1:]
changes = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate",
           "os.utime", "os.chmod", "os.chown")
def refuse(event, given):
    writes = event == "open" and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event in changes:
        for path in given[:2]:
            if isinstance(path, str) and os.path.abspath(path).startswith(folder):
                raise PermissionError(13, "read-only", path)
sys.addaudithook(refuse)
try:
    open(os.path.join(folder, "x"), "w")
except PermissionError:
    print("refused")
config = replace(load_config("folder"), root=folder, cache=cache, image_size=8)
data = ImageData(config)
data.prepare()
data.setup()
print(len(data.split("train")))
"""


def test_a_folder_that_cannot_be_written_to_is_enough(tmp_path):
    """Root may write anywhere, so every change below the folder is refused by the interpreter."""
    folder = tmp_path / "pictures"
    files.write_pictures(folder / "a", files.pictures(10, 8, 3))
    (folder / "a").chmod(0o555)
    folder.chmod(0o555)
    done = subprocess.run(
        [sys.executable, "-c", READ_ONLY, str(folder), str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    folder.chmod(0o755)
    (folder / "a").chmod(0o755)
    assert done.stdout.split() == ["refused", "9"], done.stderr
    assert [path.name for path in folder.iterdir()] == ["a"]


def test_labels_lie_beside_the_pixels_they_belong_to(tmp_path):
    images = scans(12)
    config = arrays(tmp_path, images, bits=12, labels=True)
    np.save(tmp_path / "scans" / "train_labels.npy", images[:, 0, 0, 0] % 3)
    data = opened(config)
    for split in ("train", "valid"):
        stored = data.split(split)
        wanted = stored.images.numpy()[:, 0, 0, 0] % 3
        assert [int(data.classes[i]) for i in stored.labels] == wanted.tolist()
    assert set(read_manifest(prepared_folder(config)).splits) == {"train", "valid"}
