"""`compress.py` and `decompress.py`: files come back, and nothing else is touched."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from nvae.cli.compress import main as compress_main
from nvae.cli.decompress import main as decompress_main
from nvae.data.dataset import ImageData
from tests.data.files import refuse_folder
from tests.data.test_decoding import png16
from tests.reference import FOLDER

from .checkpoints import DATA, write_checkpoint
from .commands import Commands

MODEL = "checkpoint=model.ckpt"


@pytest.fixture
def compress(tmp_path, monkeypatch, capsys):
    write_checkpoint(tmp_path / "model.ckpt")
    return Commands(compress_main, monkeypatch, capsys, tmp_path)


@pytest.fixture
def decompress(tmp_path, monkeypatch, capsys):
    return Commands(decompress_main, monkeypatch, capsys, tmp_path)


@pytest.fixture
def pictures(tmp_path):
    """30 of 8x8 in 4 bits, two of them in a folder below."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    values = np.random.default_rng(0).integers(0, 16, (30, 8, 8)) * 17
    for i, pixels in enumerate(values.astype(np.uint8)):
        where = folder / "more" if i < 2 else folder
        Image.fromarray(pixels).save(where / f"{i}.{'bmp' if i == 5 else 'png'}")
    (folder / "notes.txt").write_text("not a picture")
    return folder


def test_a_folder_there_and_back(compress, decompress, pictures, tmp_path):
    said = compress(MODEL, "input=pictures", "output=a.nvae", "verify=true", "block_images=20")
    assert "30 images" in said
    assert "1 files are no images" in said
    assert "30 images written to out" in decompress(MODEL, "input=a.nvae", "output=out")
    restored = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(restored) == 30
    for path in restored:
        name = path.relative_to(tmp_path / "out").as_posix().replace(".bmp.png", ".bmp")
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(pictures / name)))
    # interrupted and started again: what is there stays; other pixels do too, unless they may go
    decompress(MODEL, "input=a.nvae", "output=out")
    Image.new("L", (8, 8)).save(tmp_path / "out" / "7.png")
    assert "7.png is there already" in decompress.fails(MODEL, "input=a.nvae", "output=out")
    decompress(MODEL, "input=a.nvae", "output=out", "overwrite=true", "images=0-29")


@pytest.fixture
def tall(tmp_path):
    """A checkpoint of 16x8 pixels, three channels and 12 bits, and files that fit it."""
    write_checkpoint(tmp_path / "tall.ckpt", image_size=(16, 8), channels=3, bits=12)
    folder = tmp_path / "deep"
    folder.mkdir()
    arrays = np.random.default_rng(0).integers(0, 4096, (12, 16, 8, 3)).astype(np.uint16)
    for i, array in enumerate(arrays):
        if i % 3 == 0:
            (folder / f"{i}.png").write_bytes(png16(array))
        elif i % 3 == 1:
            Image.fromarray(array[:, :, 0]).save(folder / f"{i}.tif")
        else:
            np.save(folder / f"{i}.npy", array)
    return folder, arrays


def test_rectangles_of_more_bits_and_their_own_files(compress, decompress, tall, tmp_path):
    """Gray comes back as PNG of 16 bits, the rest as arrays, and all of it once more."""
    _, arrays = tall
    model = "checkpoint=tall.ckpt"
    assert "12 images" in compress(model, "input=deep", "output=a.nvae", "verify=true")
    decompress(model, "input=a.nvae", "output=out")
    compress(model, "input=out", "output=b.nvae")
    decompress(model, "input=b.nvae", "output=again")
    for folder in ("out", "again"):
        files = sorted(path.name for path in (tmp_path / folder).iterdir())
        assert len(files) == 12
        for name in files:
            array = arrays[int(name.partition(".")[0])]
            path = tmp_path / folder / name
            if name.endswith(".tif.png"):
                assert np.array_equal(np.asarray(Image.open(path)), array[:, :, 0])
            else:
                assert name.endswith((".png.npy", ".npy"))
                assert np.array_equal(np.load(path), array)


def test_files_that_do_not_fit_say_what_is_needed(compress, tall, tmp_path):
    folder, _ = tall
    Image.new("RGB", (8, 16)).save(folder / "x.png")
    error = compress.fails("checkpoint=tall.ckpt", "input=deep", "output=a.nvae")
    assert "deep/x.png has 8 bits; the model codes 16x8 color, 12 bits" in error
    assert not (tmp_path / "a.nvae").exists()


@pytest.mark.parametrize(("channels", "bits"), [(5, 12), (1, 16), (2, 4)])
def test_a_split_of_any_images(compress, decompress, tmp_path, channels, bits):
    """Numbered files: PNG of gray, arrays of levels where there are other channels."""
    path = tmp_path / "any.ckpt"
    write_checkpoint(path, image_size=(16, 8), channels=channels, bits=bits)
    compress("checkpoint=any.ckpt", "split=test", "output=a.nvae")
    decompress("checkpoint=any.ckpt", "input=a.nvae", "output=out")
    data = ImageData(replace(DATA, image_size=(16, 8), channels=channels, bits=bits))
    data.setup()
    x = torch.cat([batch.x for batch in data.batches("test")])
    levels = (x.double() * (2**bits - 1)).round().movedim(1, -1).numpy()
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files] == [
        f"{number:06d}.{'png' if channels == 1 else 'npy'}" for number in range(12)
    ]
    for file, level in zip(files, levels, strict=True):
        found = np.load(file) if channels > 1 else np.asarray(Image.open(file))[:, :, None]
        assert np.array_equal(found, level)


def test_a_split_and_some_of_its_images(compress, decompress, tmp_path):
    compress(MODEL, "split=test", "output=a.nvae")
    decompress(MODEL, "input=a.nvae", "output=out", "images=[3,5]")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "000003.png", "000005.png"
    ]  # fmt: skip


def test_archives_are_not_replaced(compress, tmp_path):
    (tmp_path / "a.nvae").write_text("mine")
    assert "is there already" in compress.fails(MODEL, "split=test", "output=a.nvae")
    assert (tmp_path / "a.nvae").read_text() == "mine"
    compress(MODEL, "split=test", "output=a.nvae", "overwrite=true")


def test_a_damaged_block_is_told_when_the_others_are_written(
    compress, decompress, pictures, tmp_path
):
    compress(MODEL, "input=pictures", "output=a.nvae", "block_images=10")
    data = bytearray((tmp_path / "a.nvae").read_bytes())
    data[-3] ^= 1
    (tmp_path / "a.nvae").write_bytes(data)
    error = decompress.fails(MODEL, "input=a.nvae", "output=out")
    assert "block 2 (images from 20): its checksum is another" in error
    assert len(list((tmp_path / "out").rglob("*.png"))) == 20


def test_a_picture_that_does_not_fit_is_named(compress, pictures, tmp_path):
    Image.new("L", (9, 8)).save(pictures / "7.png")
    error = compress.fails(MODEL, "input=pictures", "output=a.nvae")
    assert "7.png is 8x9 (height x width); the model codes 8x8 gray, 4 bits" in error
    assert not (tmp_path / "a.nvae").exists()


def test_folders_that_are_not_read_are_not_passed_over_in_silence(
    compress, pictures, tmp_path, monkeypatch
):
    (pictures / "linked").symlink_to(tmp_path)
    assert "links to folders are not followed: pictures/linked\n" in compress(
        MODEL, "input=pictures", "output=a.nvae"
    )
    refuse_folder(monkeypatch, pictures / "more")
    error = compress.fails(MODEL, "input=pictures", "output=b.nvae")
    assert "pictures/more cannot be read: Permission denied" in error
    assert not (tmp_path / "b.nvae").exists()


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["output=a.nvae"], "give one of input=FOLDER and split="),
        (["output=a.nvae", "split=test", "input=pictures"], "give one of"),
        (["output=a.nvae", "input=nowhere"], "input=nowhere is not there"),
        (["output=a.nvae", "input=."], "there are no images in"),
        (["output=.", "split=test"], "is a folder"),
        (["output=a.nvae", "split=all"], "split='all'"),
        (["output=a.nvae", "split=test", "batch_size=0"], "batch_size is 0"),
        (["output=a.nvae", "split=test", "precision=half"], "precision='half'"),
        (["split=test"], "output"),
    ],
)
def test_impossible_settings(compress, settings, line):
    assert line in compress.fails(MODEL, *settings)


def test_what_cannot_be_decompressed(compress, decompress, tmp_path):
    compress(MODEL, "split=test", "output=a.nvae")
    assert "no archive" in decompress.fails(MODEL, "input=model.ckpt", "output=out")
    error = decompress.fails(MODEL, "input=missing.nvae", "output=out")
    assert error == "error: input=missing.nvae is not there\n"
    assert "the archive has 12 images" in decompress.fails(
        MODEL, "input=a.nvae", "output=out", "images=12"
    )
    assert "is no folder" in decompress.fails(MODEL, "input=a.nvae", "output=a.nvae")
    assert not (tmp_path / "out").exists()


def test_images_of_a_published_model_of_five_bits(compress, decompress, tmp_path):
    """Its likelihood overcounts, the codec's masses do not: 5-bit images are its to take."""
    model = [f"checkpoint={FOLDER / 'vdvae_small.checkpoint.pt'}"]
    model.append(f"settings={FOLDER / 'vdvae_small.json'}")
    data = ["data=random", "data.image_size=16", "data.channels=3", "data.test_size=2"]
    wrong = compress.fails(*model, *data, "data.bits=8", "split=test", "output=a.nvae")
    assert wrong.endswith("data.bits=5 keeps the upper bits alone\n")
    assert not (tmp_path / "a.nvae").exists()
    said = compress(*model, *data, "data.bits=5", "split=test", "output=a.nvae", "verify=true")
    assert "2 images" in said
    decompress(*model, "input=a.nvae", "output=out")
    compress(*model, "input=out", "output=b.nvae")
    decompress(*model, "input=b.nvae", "output=again")
    assert len(list((tmp_path / "out").iterdir())) == 2
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
