"""Data sets that are objects: torch's by `_target_`, Hugging Face's from a folder."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from nvae.data.config import DataError, load_config
from nvae.data.dataset import ImageData
from nvae.data.pixels import BadImageError
from nvae.data.readers import read_source
from nvae.data.readers.objects import _columns, instantiate
from tests.data.files import encoded, pictures

MODULE = """
import numpy as np
from torch.utils.data import Dataset

class Numbered(Dataset):
    classes = ["even", "odd"]

    def __init__(self, count, first=0, make=None, named=False):
        self.count, self.first, self.named = count, first, named
        self.make = make or (lambda i: np.full((8, 8, 3), i, np.uint8))

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if i >= self.count:
            raise IndexError
        i += self.first
        return {"img": self.make(i), "label": i % 2} if self.named else (self.make(i), i % 2)

def full(i, size):
    return np.full((size, size, 3), i, np.uint8)
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "my_sets.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_sets", None)


def config_of(make_config, tmp_path, dataset, **overrides):
    values = {"train_size": None, "valid_size": None, "test_size": None, "root": str(tmp_path)}
    return make_config(**(values | {"format": "dataset", "dataset": dataset} | overrides))


def opened(config):
    data = ImageData(config)
    data.prepare()
    data.setup()
    return data


def numbers(data, split):
    return sorted(data.split(split).images[:, 0, 0, 0].tolist())


def test_one_data_set_is_shared_out(make_config, tmp_path):
    given = {"_target_": "my_sets.Numbered", "count": 20}
    data = opened(config_of(make_config, tmp_path, given))
    assert sorted(numbers(data, "train") + numbers(data, "valid")) == list(range(20))
    assert data.classes == ["even", "odd"]
    assert not list(tmp_path.glob("source"))


def test_one_for_each_split(make_config, tmp_path):
    given = {
        split: {"_target_": "my_sets.Numbered", "count": count, "first": first, "named": True}
        for split, count, first in (("train", 9, 0), ("test", 3, 100))
    }
    data = opened(config_of(make_config, tmp_path, given))
    assert numbers(data, "train") == list(range(9))
    assert numbers(data, "test") == [100, 101, 102]


def test_other_settings_prepare_again_and_the_same_do_not(make_config, tmp_path):
    def made(count):
        given = {"_target_": "my_sets.Numbered", "count": count}
        data = opened(config_of(make_config, tmp_path, given))
        (manifest,) = tmp_path.glob("nvae-*/manifest.json")
        return len(data.split("train")), manifest.stat().st_ino

    first = made(20)
    assert made(20) == first
    assert made(10)[0] == 9


def test_arguments_may_be_objects(make_config, tmp_path):
    inner = {"_target_": "my_sets.full", "_partial_": True, "size": 8}
    given = {"_target_": "my_sets.Numbered", "_args_": [10], "make": inner}
    assert len(opened(config_of(make_config, tmp_path, given)).split("train")) == 9


def test_torchvision_s_data_sets_are_taken(tmp_path):
    given = {"_target_": "torchvision.datasets.FakeData", "size": 40, "image_size": [3, 30, 40]}
    config = replace(load_config("folder"), dataset=given, root=str(tmp_path), labels=True)
    data = opened(config)
    batch = next(data.batches("valid"))
    assert batch.x.shape == (4, 3, 64, 64)
    assert set(batch.labels.tolist()) <= set(range(len(data.classes)))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"_target_": "nowhere_at_all.Thing"}, "there is no nowhere_at_all"),
        ({"_target_": "my_sets.Other"}, "cannot be imported: module 'my_sets' has no attribute"),
        ({"_target_": "Numbered"}, "is no dotted path"),
        ({"_target_": "my_sets:Numbered"}, "is no dotted path"),
        ({"_target_": 3}, "is no dotted path"),
        ({"_target_": "my_sets.Numbered"}, "failed: .*missing 1 required"),
        ({"_target_": "my_sets.Numbered", "count": 9, "_once_": 1}, "_once_ is not known"),
        ({"training": {"_target_": "my_sets.Numbered"}}, "data.dataset.training is no split"),
        ({"train": {"count": 3}}, "data.dataset.train has no _target_"),
    ],
)
def test_what_is_no_data_set_is_one_line(make_config, tmp_path, given, words):
    config = config_of(make_config, tmp_path, given)
    with pytest.raises(DataError, match=words) as error:
        read_source(tmp_path, "dataset", config)
    assert "\n" not in str(error.value)


def test_what_cannot_be_indexed_is_named(make_config, tmp_path):
    config = config_of(make_config, tmp_path, {"_target_": "builtins.set"})
    with pytest.raises(DataError, match="is a set, which has no length or cannot be indexed"):
        read_source(tmp_path, "dataset", config)


def test_a_description_that_is_nested_too_deep_is_refused():
    deep = {}
    for _ in range(50):
        deep = {"_target_": "builtins.dict", "a": deep}
    with pytest.raises(DataError, match="nested too deep"):
        instantiate(deep, "here")


def huggingface(make_config, folder, **overrides):
    return read_source(folder, "huggingface", make_config(format="huggingface", **overrides))


def loaded(part):
    return [item.load() for item in part.items()]


def test_splits_images_and_classes_of_the_hub(make_config, tmp_path):
    datasets = pytest.importorskip("datasets")
    images = pictures(6, 8, 3)
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"])
    )
    columns = {"image": [Image.fromarray(i) for i in images], "label": [0, 1, 1, 0, 1, 0]}
    one = datasets.Dataset.from_dict(columns, features=features)
    splits = {"train": one, "validation": one.select([0, 1]), "extra": one}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "hub")
    config = make_config(
        **{"format": "auto", "root": str(tmp_path / "hub"), "cache": str(tmp_path / "cache")},
        **{"train_size": None, "valid_size": None, "test_size": None, "labels": True},
    )
    data = opened(config)
    assert np.array_equal(data.split("train").images.numpy(), images)
    assert np.array_equal(data.split("valid").images.numpy(), images[:2])
    assert data.classes == ["cat", "dog"]
    assert next(data.batches("valid")).labels.tolist() == [0, 1]


def test_columns_are_found_or_named(make_config, tmp_path):
    datasets = pytest.importorskip("datasets")
    bytes_of = [{"bytes": encoded(image), "path": None} for image in pictures(3, 8, 3)]
    features = datasets.Features(
        left=datasets.Image(),
        right=datasets.Image(),
        scan=datasets.Array3D((4, 5, 2), "uint16"),
        fine=datasets.Value("string"),
    )
    scans = np.random.default_rng(0).integers(0, 4096, (3, 4, 5, 2)).astype(np.uint16)
    columns = {"left": bytes_of, "right": bytes_of[::-1], "scan": list(scans), "fine": [*"abc"]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "hub")
    with pytest.raises(DataError, match=r"columns left, right, scan, fine: name .*image_key"):
        huggingface(make_config, tmp_path / "hub")
    part = huggingface(make_config, tmp_path / "hub", image_key="right", label_key="fine")["train"]
    assert [each.label for each in loaded(part)] == [*"abc"]
    assert loaded(part)[0].picture == bytes_of[2]["bytes"]
    part = huggingface(make_config, tmp_path / "hub", image_key="scan")["train"]
    got = [each.picture for each in loaded(part)]
    assert np.array_equal(np.stack(got), scans)
    assert got[0].dtype == np.uint16


def test_a_picture_elsewhere_is_not_read(make_config, tmp_path):
    """A data set from a stranger may name any file."""
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "mine.png"
    path.write_bytes(encoded(pictures(1, 8, 3)[0]))
    kinds = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    entries = {"image": [{"bytes": None, "path": str(path)}] * 2}
    data = datasets.Dataset.from_dict(entries, features=datasets.Features(image=kinds))
    part = _columns(data.cast_column("image", datasets.Image()), "train", make_config())
    with pytest.raises(BadImageError, match="no picture"):
        loaded(part)


def test_without_datasets_its_extra_is_named(make_config, tmp_path, monkeypatch):
    (tmp_path / "dataset_info.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'nvae\[formats\]'"):
        huggingface(make_config, tmp_path)


def test_a_damaged_folder_is_one_line(make_config, tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "dataset_info.json").write_text("{")
    (tmp_path / "state.json").write_text("[]")
    with pytest.raises(DataError, match="is damaged") as error:
        huggingface(make_config, tmp_path)
    assert "\n" not in str(error.value)
