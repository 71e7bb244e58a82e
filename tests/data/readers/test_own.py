"""A reader from elsewhere: named in the configuration it is a format like ours; nothing but the
configuration can name one."""

import json
import sys

import numpy as np
import pytest
import torch

from nvae.data.config import READERS, DataError
from nvae.data.conversion import prepare
from nvae.data.dataset import ImageData
from nvae.data.pixels import BadImageError, fit_array
from nvae.data.places import is_current, prepared_folder
from nvae.data.prepare import main
from nvae.data.readers import entry_of, read_source
from tests.data.files import pictures

READER = """
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset
from nvae.data.readers import Reader


class Mine(Reader):
    def parts(self):
        images = np.load(self.source / "mine.npy")
        return {"train": images[:9], "test": images[9:]}


class Pictures(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return Image.fromarray(self.images[index]), 7


class Datasets(Mine):
    def parts(self):
        parts = super().parts()
        levels = torch.from_numpy(parts["test"]).permute(0, 3, 1, 2) / 255
        return {"train": Pictures(parts["train"]), "test": TensorDataset(levels, torch.zeros(3))}


class Wrong(Mine):
    def parts(self):
        return {"train": [np.zeros((8, 8, 3), np.complex64)] * 9, "test": ["text"] * 3}


class Unknown(Mine):
    def parts(self):
        return {"training": []}
"""


@pytest.fixture
def config(tmp_path, monkeypatch, make_config):
    """Of a data set that no reader of ours knows."""
    (tmp_path / "my_reader.py").write_text(READER)
    (tmp_path / "source").mkdir()
    np.save(tmp_path / "source" / "mine.npy", pictures(12, 8, 3))
    monkeypatch.syspath_prepend(tmp_path)
    yield make_config(
        format="my_reader:Mine",
        root=str(tmp_path),
        train_size=9,
        valid_size=None,
        test_size=3,
    )
    sys.modules.pop("my_reader", None)


def test_a_reader_from_outside_the_package_prepares_and_trains(config):
    data = ImageData(config)
    data.prepare()
    data.setup()
    assert np.array_equal(data.split("train").images.numpy(), pictures(12, 8, 3)[:9])
    weight = torch.zeros((), requires_grad=True)
    steps = [data.to_input(raw).x for raw in data.train_loader()]
    for x in steps:
        (weight - x.mean()).square().backward()
    assert steps[0].shape == (8, 3, 8, 8)
    assert weight.grad != 0


def test_torch_data_sets_of_pil_images_and_of_tensors_are_parts(config):
    config.format = "my_reader:Datasets"
    data = ImageData(config)
    data.prepare()
    data.setup()
    images = pictures(12, 8, 3)
    assert np.array_equal(data.split("train").images.numpy(), images[:9])
    assert np.array_equal(data.split("test").images.numpy(), images[9:])


def test_entries_that_are_no_pictures_are_named(config):
    config.format = "my_reader:Wrong"
    words = r"train number 0 cannot be used: it is an array \(8, 8, 3\) of complex64"
    with pytest.raises(DataError, match=words):
        prepare(config)


@pytest.mark.parametrize("entry", [(), "x", None, torch.zeros(3), np.zeros((2, 2, 2), complex)])
def test_entries_that_are_no_pictures_are_bad_pictures(make_config, entry):
    with pytest.raises(BadImageError):
        entry_of([entry], 0, make_config())


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_floats_out_of_range_are_no_pictures(make_config, value):
    config = make_config(image_size=2)
    picture = entry_of([torch.full((3, 2, 2), value)], 0, config).picture
    with pytest.raises(BadImageError, match=r"not between 0 and 1|not finite"):
        fit_array(picture, config)


def test_the_command_takes_it_too(config, tmp_path, capsys):
    options = ["--root", str(tmp_path), "--size", "8", "--format", config.format]
    assert main([str(tmp_path / "source"), *options]) == 0
    assert "9 images of 8x8x3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere_at_all:read", "data.format=nowhere_at_all:read cannot be imported"),
        ("my_reader:other", "data.format=my_reader:other cannot be imported"),
        ("my_reader:np", "data.format=my_reader:np is no Reader"),
        ("collections:OrderedDict", "is no Reader"),
        ("my_reader:Unknown", "gives training; splits are"),
        (":", "cannot be imported"),
    ],
)
def test_what_is_no_reader_is_one_line(config, tmp_path, name, words):
    with pytest.raises(DataError, match=words) as error:
        read_source(tmp_path / "source", name, config)
    assert "\n" not in str(error.value)


def test_the_word_of_a_manifest_imports_nothing(config, tmp_path):
    prepare(config)
    path = prepared_folder(config) / "manifest.json"
    (tmp_path / "harm.py").write_text("import pathlib\npathlib.Path(__file__).unlink()\n")
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": "harm:read"}))
    assert is_current(config)
    ImageData(config).setup()
    assert (tmp_path / "harm.py").exists()


@pytest.mark.parametrize("name", READERS)
def test_ours_are_where_the_list_says(name, tmp_path, make_config):
    """Each is imported and finds nothing in an empty folder."""
    given = {"dataset": {"_target_": "nowhere.Thing"}} if name == "dataset" else {}
    config = make_config(train_size=None, test_size=None, format=name, **given)
    with pytest.raises(DataError, match=r"not found|no pictures|no .* files|stacked|no nowhere"):
        read_source(tmp_path, name, config)
