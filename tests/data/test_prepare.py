"""Every source format, by the command, all the way to a batch; and what can go wrong on the way."""

import json
import shlex
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nvae.data.config import CONFIG_FOLDER, IN_MEMORY_FORMATS, DataError, config_names, load_config
from nvae.data.conversion import prepare, prepare_if_missing
from nvae.data.module import ImageDataModule
from nvae.data.places import prepared_folder
from nvae.data.prepare import main
from nvae.data.store import read_manifest
from tests.data import files
from tests.data.files import open_splits


def batch_of(config, split="train"):
    """(x, pixels) of a whole split: the model's input and what is stored."""
    config = replace(config, batch_size=2, eval_batch_size=100)
    module = ImageDataModule(config)
    module.prepare_data()
    module.setup()
    assert next(iter(module.train_dataloader())).indices.shape == (2,)
    (batch,) = module.batches(split)
    return batch.x, module.split(split).images.numpy()


def run(*arguments):
    return main([str(argument) for argument in arguments])


def place(root, size=8):
    """The prepared form of a folder that holds nothing but pictures: in the cache."""
    return prepared_folder(replace(load_config("folder"), root=str(root), image_size=size))


def listed(folder):
    """Everything in a folder of the user's, with sizes and times."""
    return {
        path: (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in (folder, *folder.rglob("*"))
    }


def idx(folder):
    train, test = files.pictures(8, 28, 1), files.pictures(4, 28, 1, seed=1)
    files.write_idx(folder, train, test)
    return train, test


def cifar(folder):
    train, test = files.pictures(10, 32, 3), files.pictures(4, 32, 3, seed=1)
    files.write_cifar(folder, train, test)
    return train, test


def omniglot(folder):
    train, test = files.pictures(8, 28, 1), files.pictures(4, 28, 1, seed=1)
    files.write_chardata(folder, train, test)
    return train, test


def npz(folder):
    train, valid = files.pictures(8, 32, 3), files.pictures(4, 32, 3, seed=1)
    files.write_npz(folder, [train[:5], train[5:]], valid)
    return train, valid


def folders(folder):
    train, valid = files.pictures(8, 32, 3), files.pictures(4, 32, 3, seed=1)
    files.write_pictures(folder / "train", train)
    files.write_pictures(folder / "valid", valid)
    return train, valid


def tfrecords(folder):
    train, valid = files.pictures(8, 32, 3), files.pictures(4, 32, 3, seed=1)
    files.write_tfrecords(folder / "train" / "0.tfrecords", train)
    files.write_tfrecords(folder / "validation" / "0.tfrecords", valid)
    return train, valid


def reference_lmdb(folder):
    train, valid = files.pictures(8, 32, 3), files.pictures(4, 32, 3, seed=1)
    files.write_reference_lmdb(
        folder, [i.tobytes() for i in train], [files.encoded(i) for i in valid]
    )
    return train, valid


FORMATS = {
    "idx": (idx, "fashion_mnist", []),
    "cifar": (cifar, "cifar10", []),
    "omniglot": (omniglot, "omniglot", []),
    "npz": (npz, "imagenet32_npz", []),
    "folder": (folders, "folder", ["--size", 32]),
    "tfrecord": (tfrecords, "imagenet32", []),
    "lmdb": (reference_lmdb, "folder", ["--size", 32]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_lossless_format_reaches_the_model_with_exact_pixels(tmp_path, name):
    write, data_set, options = FORMATS[name]
    train, held_out = write(tmp_path / "source")
    sizes = ["--train-size", len(train), "--valid-size", 0, "--test-size", len(held_out)]
    if name in ("npz", "folder", "tfrecord", "lmdb"):
        sizes = ["--train-size", len(train), "--valid-size", len(held_out), "--test-size", 0]
    assert run(data_set, "--root", tmp_path, *options, *sizes) == 0
    config = replace(
        load_config(data_set),
        root=str(tmp_path),
        bits=8,
        binarize="none",
        image_size=32,
        train_size=len(train),
        valid_size=sizes[3],
        test_size=sizes[5],
    )
    x, stored = batch_of(config, "train")
    assert np.array_equal(stored, train)
    wanted = torch.from_numpy(train).permute(0, 3, 1, 2).float() / 255
    pad = config.pad
    assert torch.equal(x[:, :, pad : 32 - pad, pad : 32 - pad], wanted)
    assert np.array_equal(batch_of(config, "test")[1], held_out)


@pytest.mark.parametrize("packed", [True, False])
def test_celeba_is_cropped_resized_and_split_as_in_the_paper(tmp_path, packed):
    images = np.random.default_rng(0).integers(0, 256, (6, 218, 178, 3), np.uint8)
    files.write_celeba(tmp_path / "source", images, [0, 0, 0, 1, 1, 2], packed=packed)
    sizes = ["--train-size", 3, "--valid-size", 2, "--test-size", 1]
    assert run("celeba64", "--root", tmp_path, *sizes) == 0
    config = replace(
        load_config("celeba64"), root=str(tmp_path), train_size=3, valid_size=2, test_size=1
    )
    x, stored = batch_of(config, "valid")
    wanted = Image.fromarray(images[4][40:188, 15:163]).resize((64, 64), Image.Resampling.BILINEAR)
    assert np.array_equal(stored[1], np.asarray(wanted))
    assert x.shape == (2, 3, 64, 64)


@pytest.mark.parametrize("size", [64, 128])
def test_lsun_crops_at_random_in_training_and_at_the_center_in_validation(tmp_path, size):
    """Resize to the shorter side, then a window along the longer one (spec, section 1)."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (256, 300 + 10 * i, 3), np.uint8) for i in range(4)]
    for split, rows in (("train", images), ("val", images[:2])):
        values = {f"{i}".encode(): files.encoded(p) for i, p in enumerate(rows)}
        files.write_lmdb(tmp_path / "source" / f"tower_{split}_lmdb", values)
    sizes = ["--train-size", 4, "--valid-size", 2]
    assert run("lsun_tower", "--root", tmp_path, "--size", size, *sizes) == 0
    config = replace(
        load_config("lsun_tower"),
        root=str(tmp_path),
        image_size=size,
        train_size=4,
        valid_size=2,
        batch_size=4,
        flip=False,
        bits=8,
    )
    module = ImageDataModule(config)
    module.prepare_data()
    module.setup()
    (valid,) = module.batches("valid")
    width = 310 * size // 256
    resized = Image.fromarray(images[1]).resize((width, size), Image.Resampling.BILINEAR)
    left = (width - size) // 2
    center = torch.from_numpy(np.asarray(resized)[:, left : left + size].copy())
    assert torch.equal(valid.x[1], center.permute(2, 0, 1).float() / 255)

    def epoch():
        (raw,) = loader
        return module.to_input(raw).x[raw.indices.argsort()]

    loader = module.train_dataloader()
    first, second = epoch(), epoch()
    assert first.shape == (4, 3, size, size)
    assert not torch.equal(first, second)


def test_stacked_mnist_is_made_of_digits(tmp_path):
    idx(tmp_path / "source")
    sizes = ["--train-size", 9, "--valid-size", 3, "--test-size", 5]
    assert run("stacked_mnist", "--root", tmp_path, *sizes) == 0
    config = replace(
        load_config("stacked_mnist"), root=str(tmp_path), train_size=9, valid_size=3, test_size=5
    )
    x, stored = batch_of(config, "test")
    assert stored.shape == (5, 28, 28, 3)
    assert x.shape == (5, 3, 32, 32)


def test_any_folder_of_pictures_trains_without_a_preparing_command(tmp_path):
    """Gray, color, odd sizes; and pictures added later are seen."""
    for i, (mode, size) in enumerate([("L", (40, 30)), ("RGB", (17, 50)), ("CMYK", (32, 32))] * 5):
        Image.new(mode, size).save(tmp_path / f"{i}.jpg")
    config = replace(load_config("folder"), root=str(tmp_path), image_size=16)
    x, _ = batch_of(config)
    assert x.shape == (14, 3, 16, 16)
    assert prepared_folder(config).name == "nvae-16x16x3"
    assert tmp_path not in prepared_folder(config).parents
    stamp = (prepared_folder(config) / "manifest.json").stat().st_mtime_ns
    prepare_if_missing(config)
    assert (prepared_folder(config) / "manifest.json").stat().st_mtime_ns == stamp
    Image.new("RGB", (9, 9)).save(tmp_path / "new.png")
    prepare_if_missing(config)
    assert sum(len(split) for split in open_splits(config).values()) == 16


def test_sizes_and_channels_of_one_folder_live_side_by_side(tmp_path):
    files.write_pictures(tmp_path, files.pictures(10, 12, 3))
    for size, channels in ((8, 1), (8, 3), (12, 3)):
        assert run(tmp_path, "--size", size, "--channels", channels) == 0
    for size, channels in ((8, 1), (8, 3), (12, 3)):
        config = replace(
            load_config("folder"), root=str(tmp_path), image_size=size, channels=channels
        )
        assert open_splits(config)["train"].shape == (size, size, channels)


def test_an_archive_is_prepared_as_a_folder_is(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for i, image in enumerate(files.pictures(10, 8, 3)):
            archive.writestr(f"{i}.png", files.encoded(image))
    before = listed(tmp_path)
    assert run(tmp_path / "set.zip", "--size", 8) == 0
    assert read_manifest(place(tmp_path / "set.zip")).splits["train"].count == 9
    assert listed(tmp_path) == before


def test_other_geometry_than_prepared_is_refused(tmp_path):
    files.write_pictures(tmp_path, files.pictures(10, 12, 3))
    assert run(tmp_path, "--size", 8, "--resize", "box") == 0
    config = replace(load_config("folder"), root=str(tmp_path), image_size=8)
    with pytest.raises(DataError, match=r"resize=box, the config says .*resize=bilinear") as error:
        open_splits(config)
    assert run(*shlex.split(str(error.value).partition("nvae.data.prepare ")[2])) == 0
    open_splits(config)


def test_other_sizes_than_prepared_are_refused(tmp_path):
    files.write_pictures(tmp_path, files.pictures(10, 8, 3))
    assert run(tmp_path, "--size", 8) == 0
    config = replace(load_config("folder"), root=str(tmp_path), image_size=8, train_size=10)
    with pytest.raises(DataError, match=r"has 9 train images, the config says data\.train_size=10"):
        open_splits(config)
    other = replace(config, train_size=None, valid_size=3)
    with pytest.raises(DataError, match=r"has 1 valid images, .*data\.valid_size=3") as error:
        open_splits(other)
    assert run(*shlex.split(str(error.value).partition("nvae.data.prepare ")[2])) == 0
    assert len(open_splits(other)["valid"]) == 3
    direct = replace(config, root=str(place(tmp_path)), train_size=None, channels=1)
    with pytest.raises(DataError, match="are 8x8x3, the config wants 8x8x1"):
        open_splits(direct)


def with_bad_picture(folder):
    files.write_pictures(folder, files.pictures(10, 8, 3))
    (folder / "0003.png").write_bytes(b"")


def test_a_bad_picture_stops_the_preparation_by_name(tmp_path, capsys):
    with_bad_picture(tmp_path)
    assert run(tmp_path, "--size", 8) == 1
    assert capsys.readouterr().err == "error: 0003.png cannot be used: it is empty\n"
    assert not list(place(tmp_path).glob("*.npy"))
    assert not list(place(tmp_path).glob("*.partial"))


def test_a_bad_picture_is_skipped_and_counted_by_choice(tmp_path, capsys):
    with_bad_picture(tmp_path)
    options = ("--size", 8, "--train-size", 8, "--valid-size", 2, "--on-corrupt", "skip")
    assert run(tmp_path, *options) == 0
    assert "skipped 0003.png: it is empty" in capsys.readouterr().err
    manifest = json.loads((place(tmp_path) / "manifest.json").read_text())
    assert sum(split["skipped"] for split in manifest["splits"].values()) == 1
    assert manifest["skipped_names"] == ["0003.png: it is empty"]
    # The config names the source's sizes; what was skipped is accounted for.
    config = replace(
        load_config("folder"), root=str(tmp_path), image_size=8, train_size=8, valid_size=2
    )
    assert sum(len(split) for split in open_splits(config).values()) == 9


def test_nothing_but_bad_pictures_is_an_error(tmp_path, capsys):
    tmp_path.joinpath("a.png").write_bytes(b"")
    tmp_path.joinpath("b.png").write_bytes(b"")
    assert run(tmp_path, "--size", 8, "--on-corrupt", "skip") == 1
    assert "none of the 1 train pictures can be read" in capsys.readouterr().err


def test_a_split_of_nothing_but_bad_pictures_is_an_error(tmp_path, capsys):
    files.write_pictures(tmp_path / "train", files.pictures(4, 8, 3))
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "a.png").write_bytes(b"")
    assert run(tmp_path, "--size", 8, "--on-corrupt", "skip") == 1
    assert capsys.readouterr().err == (
        "error: none of the 1 test pictures can be read; the first that cannot is test/a.png: it "
        "is empty\n"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "neither a folder nor a data set; known: arrays, celeba64"),
        (["imagenet64"], "put "),
        (["folder", "--root", "nowhere"], "nowhere does not exist"),
        (["cifar10", "--no-download"], "put cifar-10-python.tar.gz"),
        (["folder", "--size", "0"], "data.image_size is 0; it must be at least 1"),
        (["folder", "--workers", "-1"], "--workers is -1; allowed: 1 to 256"),
        (["folder", "--workers", "9999999"], "--workers is 9999999; allowed: 1 to 256"),
        (["x" * 100_000], "File name too long"),
        (["../data/cifar10"], "is neither a folder nor a data set"),
        (["digits"], "digits is made in memory: there is nothing to prepare"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["folder", "--size", "many"], "argument --size: 'many' is neither SIDE nor HEIGHTxWIDTH"),
        (["folder", "--size", "8x8x3"], "'8x8x3' is neither SIDE nor HEIGHTxWIDTH"),
        (["folder", "--size", "9" * 100_000], "argument --size"),
        (["folder", "--channels", "two"], "argument --channels: invalid int value: 'two'"),
        (["folder", "--labels", "some"], "argument --labels: invalid choice: 'some'"),
        ([], "the following arguments are required: NAME|FOLDER"),
    ],
)
def test_wrong_options_are_one_line_and_exit_code_2(capsys, arguments, words):
    with pytest.raises(SystemExit, match="2"):
        run(*arguments)
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert len(error) < 520


@pytest.mark.parametrize(
    ("error", "words"),
    [(MemoryError(), "not enough memory"), (RecursionError("too deep"), "error: too deep")],
)
def test_what_python_runs_out_of_is_one_line(tmp_path, monkeypatch, capsys, error, words):
    files.write_pictures(tmp_path, files.pictures(10, 8, 3))

    def failing(*arguments, **options):
        raise error

    monkeypatch.setattr("nvae.data.conversion.fit", failing)
    assert run(tmp_path, "--size", 8) == 1
    out = capsys.readouterr().err
    assert words in out
    assert out.count("\n") == 1


IMPORT_INTERRUPTED = """
import builtins, runpy, sys
real = builtins.__import__
def interrupted(name, *rest, **options):
    if name == {name!r}:
        raise KeyboardInterrupt
    return real(name, *rest, **options)
builtins.__import__ = interrupted
sys.argv = ["prepare", "digits"]
runpy.run_module("nvae.data.prepare", run_name="__main__")
"""


@pytest.mark.parametrize("name", ["torch", "rich.progress"])
def test_ctrl_c_while_modules_are_imported_is_one_line(name):
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_INTERRUPTED.format(name=name)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert (done.returncode, done.stderr) == (130, "interrupted; run the same command again\n")


def test_ctrl_c_in_the_work_is_one_line_and_changes_nothing(tmp_path, monkeypatch, capsys):
    files.write_pictures(tmp_path, files.pictures(10, 8, 3))

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("nvae.data.conversion._convert", interrupted)
    monkeypatch.setattr("nvae.command_line.signal.signal", lambda *_: None)
    with pytest.raises(SystemExit, match="130"):
        run(tmp_path, "--size", 8)
    assert capsys.readouterr().err == "interrupted; run the same command again\n"
    assert not list(place(tmp_path).glob("*.npy"))


def test_one_picture_is_too_few_and_two_are_enough(tmp_path, capsys):
    """A hint must be one that helps: there is nothing to set."""
    files.write_pictures(tmp_path, files.pictures(1, 8, 3))
    assert run(tmp_path, "--size", 8) == 1
    error = capsys.readouterr().err
    assert "the source has one picture; it takes at least two" in error
    assert "data.valid_size" not in error
    files.write_pictures(tmp_path, files.pictures(2, 8, 3))
    assert run(tmp_path, "--size", 8) == 0


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from nvae.data.prepare import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk_in_the_middle_leaves_the_old_form_and_no_rubbish(tmp_path):
    """The kernel refuses to let a file grow past 20 kB, as a full disk would."""
    files.write_pictures(tmp_path, files.pictures(10, 8, 3))
    assert run(tmp_path, "--size", 8) == 0
    before = sorted(path.name for path in place(tmp_path).iterdir())
    files.write_pictures(tmp_path / "more", files.pictures(200, 8, 3))
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path), "--size", "8"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith(f"error: {place(tmp_path)} cannot be written")
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in place(tmp_path).iterdir()) == before
    config = replace(load_config("folder"), root=str(tmp_path), image_size=8)
    assert len(open_splits(config)["train"]) == 9


def test_too_little_room_is_said_before_the_work(tmp_path, monkeypatch, capsys):
    files.write_pictures(tmp_path, files.pictures(10, 8, 3))
    monkeypatch.setattr("nvae.data.conversion.shutil.disk_usage", lambda _: FreeSpace)
    assert run(tmp_path, "--size", 8) == 1
    assert "needs 0.0 GB for 10 images, only 0.0 GB are free" in capsys.readouterr().err


class FreeSpace:
    free = 10


STALLED = """
import sys, time
from nvae.data import conversion
real = conversion.fit
def slow(*args, **kwargs):
    print("started", flush=True)
    time.sleep(60)
conversion.fit = slow
from nvae.data.prepare import main
main(sys.argv[1:])
"""


def test_a_killed_preparation_starts_again_cleanly(tmp_path):
    files.write_pictures(tmp_path, files.pictures(10, 8, 3))
    process = subprocess.Popen(
        [sys.executable, "-c", STALLED, str(tmp_path), "--size", "8"],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"started\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    folder = place(tmp_path)
    assert list(folder.glob("*.partial"))
    assert run(tmp_path, "--size", 8) == 0
    assert not list(folder.glob("*.partial"))
    assert read_manifest(folder).splits["train"].count == 9


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_do_not_change_the_result(tmp_path, workers):
    files.write_pictures(tmp_path, files.pictures(70, 9, 3))
    config = replace(load_config("folder"), root=str(tmp_path), image_size=8)
    prepare(config, workers=workers)
    one = read_manifest(prepared_folder(config)).splits["train"].pixels.sha256
    prepare(config, workers=2)
    assert read_manifest(prepared_folder(config)).splits["train"].pixels.sha256 == one


@pytest.mark.parametrize("path", sorted(CONFIG_FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_is_complete(path):
    """Size, channels, likelihood, bits, split sizes, licence and citation are all stated."""
    config = load_config(path.stem)
    assert config.name == path.stem
    assert config.licence
    assert config.citation
    own = path.stem in ("folder", "arrays")
    if not own:
        assert None not in (config.train_size, config.valid_size, config.test_size)
        assert config.valid_size or config.test_size
    if config.format not in IN_MEMORY_FORMATS and not own:
        assert config.files
        assert config.homepage
        assert config.root == f"data/{path.stem}"
    assert (path.stem in config_names()) == (config.format not in IN_MEMORY_FORMATS)
    if config.channels == 1:
        assert not config.flip


def test_sizes_of_the_paper():
    def sizes(name):
        config = load_config(name)
        return config.train_size, config.valid_size, config.test_size

    assert sizes("celeba64")[:2] == (162770, 19867)
    assert sizes("celebahq256")[:2] == (27000, 3000)
    assert sizes("ffhq256")[:2] == (63000, 7000)
    assert load_config("celeba64").crop_box == [15, 40, 163, 188]
    assert load_config("ffhq256").bits == load_config("celebahq256").bits == 5
