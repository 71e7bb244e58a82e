"""Class labels: where sources have them, how classes are numbered, and what batches hold."""

import csv
import gzip
import json
import struct
import tarfile
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch

from nvae.data.config import DataError, load_config
from nvae.data.conversion import prepare_if_missing
from nvae.data.dataset import ImageData
from nvae.data.labels import LabelTable, label_of
from nvae.data.places import listing_digest, prepared_folder
from nvae.data.prepare import main
from nvae.data.store import read_manifest
from tests.data import files

IMAGES = files.pictures(12, 8, 3)


def opened(config):
    data = ImageData(config)
    data.prepare()
    data.setup()
    return data


def folder(root, **overrides):
    return replace(load_config("folder"), root=str(root), image_size=8, **overrides)


def by_class(data):
    """What each class's pictures are, over all splits."""
    found = {}
    for split in {id(s): s for s in map(data.split, ("train", "valid", "test"))}.values():
        for image, label in zip(split.images.numpy(), split.labels.tolist(), strict=True):
            found.setdefault(data.classes[label], set()).add(image.tobytes())
    return found


def wanted(**rows):
    return {name: {IMAGES[i].tobytes() for i in numbers} for name, numbers in rows.items()}


def write(folder, numbers):
    folder.mkdir(parents=True, exist_ok=True)
    for i in numbers:
        (folder / f"{i}.png").write_bytes(files.encoded(IMAGES[i]))


def test_folders_are_classes(tmp_path):
    write(tmp_path / "dog" / "old", [0, 1, 2])
    write(tmp_path / "cat", [3, 4, 5])
    data = opened(folder(tmp_path, labels=True))
    assert data.classes == ["cat", "dog"]
    assert by_class(data) == wanted(dog=[0, 1, 2], cat=[3, 4, 5])


def test_the_class_is_the_first_folder_below_the_split(tmp_path):
    for split, start in (("train", 0), ("valid", 4), ("test", 8)):
        write(tmp_path / split / "b", [start, start + 1])
        write(tmp_path / split / "a", [start + 2, start + 3])
    data = opened(folder(tmp_path, labels=True))
    assert data.split("test").labels.tolist() == [0, 0, 1, 1]
    assert by_class(data) == wanted(b=[0, 1, 4, 5, 8, 9], a=[2, 3, 6, 7, 10, 11])


def test_a_class_may_be_called_as_splits_are(tmp_path):
    write(tmp_path / "car", [0, 1, 2])
    write(tmp_path / "train", [3, 4, 5])
    write(tmp_path / "train_station", [6, 7, 8])
    found = by_class(opened(folder(tmp_path, labels=True)))
    assert found == wanted(car=[0, 1, 2], train=[3, 4, 5], train_station=[6, 7, 8])


def test_a_folder_around_everything_is_no_class(tmp_path):
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive:
        for i, image in enumerate(IMAGES):
            archive.writestr(f"pets/{'cat' if i % 2 else 'dog'}/{i}.png", files.encoded(image))
    data = opened(folder(tmp_path / "pets.zip", labels=True))
    assert by_class(data) == wanted(cat=range(1, 12, 2), dog=range(0, 12, 2))
    assert opened(folder(tmp_path, labels=True)).classes == ["cat", "dog"]


@pytest.mark.parametrize(
    ("name", "header"), [("labels.csv", "file,label"), ("metadata.csv", "note,file_name,Label")]
)
def test_a_csv_file_says_the_classes(tmp_path, name, header):
    write(tmp_path / "pictures", range(12))
    rows = [header.split(",")] + [
        [*["x, y"][: header.count(",") - 1], f"pictures/{i}.png", str(i % 3 * 10)]
        for i in range(12)
    ]
    with (tmp_path / name).open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    data = opened(folder(tmp_path, labels=True))
    assert data.classes == ["0", "10", "20"]
    assert by_class(data)["10"] == wanted(ten=[1, 4, 7, 10])["ten"]


def test_csv_files_lie_beside_their_pictures(tmp_path):
    for split, numbers in (("train", range(8)), ("test", range(8, 12))):
        write(tmp_path / split, numbers)
        lines = ["file_name,label", *(f"{i}.png,{'odd' if i % 2 else 'even'}" for i in numbers)]
        (tmp_path / split / "metadata.csv").write_text("\n".join(lines))
    data = opened(folder(tmp_path, labels=True))
    assert data.split("test").labels.tolist() == [0, 1, 0, 1]  # 10, 11, 8, 9 by name
    assert by_class(data) == wanted(even=range(0, 12, 2), odd=range(1, 12, 2))


@pytest.mark.parametrize("suffix", ["zip", "tar.gz"])
@pytest.mark.parametrize("inside", [True, False])
def test_csv_files_in_archives_are_read(tmp_path, suffix, inside):
    lines = ["file,label", *(f"{i}.png,{'odd' if i % 2 else 'even'}" for i in range(12))]
    members = {f"set/{i}.png": files.encoded(image) for i, image in enumerate(IMAGES)}
    members |= {"set/labels.csv": "\n".join(lines).encode(), "__MACOSX/labels.csv": b"x"}
    path = tmp_path / f"set.{suffix}"
    if suffix == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(path, "w:gz") as archive:
            for name, data in members.items():
                files.add_to_tar(archive, name, data)
    data = opened(folder(tmp_path if inside else path, labels=True))
    assert by_class(data) == wanted(even=range(0, 12, 2), odd=range(1, 12, 2))


def test_a_bad_csv_file_in_an_archive_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("0.png", files.encoded(IMAGES[0]))
        archive.writestr("metadata.csv", "a,b\n")
    with pytest.raises(DataError, match=r"set\.zip: metadata\.csv must begin .*labels=false"):
        prepare_if_missing(folder(tmp_path))


def test_a_changed_csv_file_is_seen(tmp_path):
    write(tmp_path, [0, 1])
    before = listing_digest(tmp_path, "folder")
    (tmp_path / "labels.csv").write_text("file,label\n")
    assert listing_digest(tmp_path, "folder") != before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0.png,cat\n", r"must begin with a line that names its columns: file,label"),
        ("", "must begin with"),
        ("file,label\n0.png\n", "line 2: it has 1 columns"),
        ("file,label\n" + "x" * 200_000, "line 2: field larger"),
        ("file,label\n0.png,cat\n", "1.png has no label, and data.labels=true needs one"),
    ],
)
def test_a_bad_csv_file_is_named(tmp_path, text, words):
    write(tmp_path, [0, 1])
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(DataError, match=words) as error:
        prepare_if_missing(folder(tmp_path, labels=True))
    assert "\n" not in str(error.value)


def idx_labels(folder, **labels):
    for name, values in labels.items():
        data = struct.pack(">II", 0x801, len(values)) + bytes(values)
        (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(data))


def idx_config(root):
    sizes = {"train_size": 8, "valid_size": 0, "test_size": 4}
    return replace(load_config("fashion_mnist"), root=str(root), labels=True, **sizes)


def test_idx_labels_are_read_and_counted(tmp_path):
    source = tmp_path / "source"
    files.write_idx(source, files.pictures(8, 28, 1), files.pictures(4, 28, 1))
    with pytest.raises(DataError, match=r"train number 0 has no label, and data\.labels=true"):
        opened(idx_config(tmp_path))
    idx_labels(source, train=[9, 8, 7, 6, 5, 4, 3, 2], t10k=[1, 0, 1, 9])
    data = opened(idx_config(tmp_path))
    assert data.classes == [str(i) for i in range(10)]
    assert data.split("train").labels.tolist() == [9, 8, 7, 6, 5, 4, 3, 2]
    assert data.split("test").labels.tolist() == [1, 0, 1, 9]
    idx_labels(source, train=[1], t10k=[1])
    with pytest.raises(DataError, match="not an IDX file of 8 labels"):
        opened(idx_config(tmp_path))


def test_labels_of_cifar_batches_are_not_unpickled(tmp_path, monkeypatch):
    import pickle

    train, test = files.pictures(10, 32, 3), files.pictures(4, 32, 3)
    real = pickle.dumps

    def dumps(batch, protocol):
        count = len(batch[b"data"])
        more = {b"batch_label": b"x", b"labels": list(range(count)), b"filenames": [b"y"] * count}
        return real({**more, **batch, b"labels": list(range(count))}, protocol=protocol)

    monkeypatch.setattr(files.pickle, "dumps", dumps)
    files.write_cifar(tmp_path / "source", train, test)
    monkeypatch.setattr(pickle, "load", lambda *_: pytest.fail("unpickled"))
    monkeypatch.setattr(pickle, "loads", lambda *_: pytest.fail("unpickled"))
    sizes = {"train_size": 10, "valid_size": 0, "test_size": 4}
    config = replace(load_config("cifar10"), root=str(tmp_path), labels=True, **sizes)
    data = opened(config)
    assert data.split("train").labels.tolist() == [0, 1] * 5
    assert data.split("test").labels.tolist() == [0, 1, 2, 3]


def test_labels_of_imagenet_batches_start_at_one(tmp_path):
    images = files.pictures(4, 32, 3)
    rows = images.transpose(0, 3, 1, 2).reshape(4, -1)
    (tmp_path / "source").mkdir()
    for name in ("train_data_batch_1", "val_data"):
        labels = np.array([1000, 1, 1000, 7])
        np.savez(tmp_path / "source" / f"{name}.npz", data=rows, labels=labels)
    sizes = {"train_size": 4, "valid_size": 4, "test_size": 0}
    config = replace(load_config("imagenet32_npz"), root=str(tmp_path), labels=True, **sizes)
    data = opened(config)
    assert data.classes == ["1", "7", "1000"]
    assert data.split("train").labels.tolist() == [2, 0, 2, 1]


def test_digits_have_labels_in_memory():
    data = opened(replace(load_config("digits"), labels=True))
    assert len(data.classes) == 10
    assert torch.bincount(data.split("train").labels).min() > 100


@pytest.mark.parametrize("on_device", ["always", "never"])
def test_a_batch_holds_the_labels_of_its_images(on_device):
    data = opened(replace(load_config("digits"), labels=True, on_device=on_device))
    labels = data.split("train").labels
    seen = 0
    for raw in data.train_loader():
        batch = data.to_input(raw)
        assert torch.equal(batch.labels, labels[batch.index])
        assert batch.labels.dtype == torch.int64
        seen += len(batch.labels)
    assert seen > 1300


@pytest.mark.parametrize("labels", ["auto", False])
def test_without_need_of_labels_batches_are_what_they_were(labels):
    usual, other = (opened(replace(load_config("digits"), labels=each)) for each in (True, labels))
    for one, two in zip(usual.batches("valid"), other.batches("valid"), strict=True):
        assert torch.equal(one.x, two.x)
        assert torch.equal(one.index, two.index)
        assert two.labels is None


def test_pixels_are_the_same_files_with_and_without_labels(tmp_path):
    write(tmp_path / "a", range(6))
    write(tmp_path / "b", range(6, 12))
    manifests = []
    for labels in (False, "auto", True):
        config = folder(tmp_path, labels=labels, cache=str(tmp_path / "cache" / str(labels)))
        prepare_if_missing(config)
        manifests.append(read_manifest(prepared_folder(config)))
    assert [manifest.classes for manifest in manifests] == [[], ["a", "b"], ["a", "b"]]
    pixels = [{s: f.pixels for s, f in manifest.splits.items()} for manifest in manifests]
    assert pixels[0] == pixels[1] == pixels[2]


def test_labels_that_are_not_there_are_missed_only_where_needed(tmp_path):
    write(tmp_path, range(6))
    assert opened(folder(tmp_path)).classes == []
    with pytest.raises(DataError, match=r"png has no label, and data\.labels=true needs one"):
        opened(folder(tmp_path, labels=True))


def test_a_picture_that_costs_the_others_their_labels_is_named(tmp_path, capsys):
    write(tmp_path / "a", range(3))
    write(tmp_path / "b", range(3, 6))
    write(tmp_path, [6])
    assert opened(folder(tmp_path)).classes == []
    assert capsys.readouterr().err == "note: labels are not kept: 6.png has no label\n"
    (tmp_path / "6.png").unlink()
    assert opened(folder(tmp_path)).classes == ["a", "b"]
    assert capsys.readouterr().err == ""


def test_pictures_without_any_labels_lose_none(tmp_path, capsys):
    write(tmp_path, range(6))
    opened(folder(tmp_path))
    assert capsys.readouterr().err == ""


def test_one_class_is_none(tmp_path):
    write(tmp_path / "cats", range(6))
    assert opened(folder(tmp_path)).classes == []
    with pytest.raises(DataError, match="all pictures are of one class, 'cats'"):
        opened(folder(tmp_path, labels=True))


def test_a_form_without_labels_is_made_again_where_they_are_needed(tmp_path):
    write(tmp_path / "a", range(6))
    write(tmp_path / "b", range(6, 12))
    assert opened(folder(tmp_path, labels=False)).classes == []
    assert opened(folder(tmp_path)).classes == []  # it is there, and nobody needs them
    assert opened(folder(tmp_path, labels=True)).classes == ["a", "b"]


def test_a_form_without_labels_and_without_a_source_says_so(tmp_path):
    write(tmp_path / "source" / "a", range(12))
    config = folder(tmp_path)
    prepare_if_missing(config)
    direct = folder(prepared_folder(config), labels=True)
    with pytest.raises(DataError, match="has no labels of its train images"):
        opened(direct)


@pytest.mark.parametrize("change", ["number", "count", "classes"])
def test_labels_on_disk_are_checked(tmp_path, change):
    write(tmp_path / "a", range(6))
    write(tmp_path / "b", range(6, 12))
    config = folder(tmp_path, labels=True)
    prepare_if_missing(config)
    place = prepared_folder(config)
    path = place / "manifest.json"
    content = json.loads(path.read_text())
    if change == "classes":
        content["classes"] = ["a"]
    else:
        file = place / content["splits"]["train"]["labels"]["file"]
        labels = np.load(file)
        np.save(file, np.full_like(labels, 2) if change == "number" else labels[:-1])
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"altered|bytes instead of|does not hold"):
        ImageData(config).setup()


def test_the_command_names_the_classes(tmp_path, capsys):
    write(tmp_path / "a", range(6))
    write(tmp_path / "b", range(6, 12))
    assert main([str(tmp_path), "--size", "8", "--labels", "true"]) == 0
    assert "labels: 2 classes (a, b)\n" in capsys.readouterr().out


def test_skipped_pictures_take_their_labels_along(tmp_path):
    write(tmp_path / "a", range(6))
    write(tmp_path / "b", range(6, 12))
    (tmp_path / "a" / "1.png").write_bytes(b"")
    assert main([str(tmp_path), "--size", "8", "--on-corrupt", "skip"]) == 0
    found = by_class(opened(folder(tmp_path, labels=True)))
    assert found == wanted(a=[0, 2, 3, 4, 5], b=range(6, 12))


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (3, 3),
        (True, 1),
        (np.uint8(3), 3),
        (np.array([3]), 3),
        (torch.tensor(3), 3),
        (torch.tensor([3]), 3),
        (np.float64(3), 3),
        (b"cat", "cat"),
        (np.str_("cat"), "cat"),
        ("cat", "cat"),
        (3.5, None),
        (None, None),
        (np.zeros(3), None),
        ([1], None),
    ],
)
def test_what_is_a_label(value, label):
    assert label_of(value) == label


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([10, 9, 100], ["9", "10", "100"]),
        (["10", "9", "-1"], ["-1", "9", "10"]),
        (["b", "10", "a"], ["10", "a", "b"]),
        ([2, "a"], ["2", "a"]),
    ],
)
def test_classes_are_numbered_by_value_or_name(labels, classes):
    table = LabelTable(True, [None])
    for label in labels:
        table.add("train", label, "x")
    names, numbers = table.finish()
    assert names == classes
    assert [names[n] for n in numbers["train"]] == [str(label) for label in labels]


def test_known_names_keep_their_numbers():
    table = LabelTable(True, [None, ["a", "b", "c"]])
    for label in (2, 0):
        table.add("train", label, "x")
    names, numbers = table.finish()
    assert names == ["a", "b", "c"]
    assert numbers["train"].tolist() == [2, 0]
    with pytest.raises(DataError, match="x has the label 3, and there are 3 classes"):
        table.add("train", 3, "x")


def test_a_fingerprint_tells_other_labels_apart(tmp_path):
    """A run must not go on with other classes of the same pictures."""
    found = []
    for name, classes in (("a", "aaabbb"), ("b", "aababb")):
        write(tmp_path / name, range(6))
        rows = "".join(f"{i}.png,{label}\n" for i, label in enumerate(classes))
        (tmp_path / name / "labels.csv").write_text(f"file,label\n{rows}")
        found.append(opened(folder(tmp_path / name, labels=True)).fingerprint()["splits"]["train"])
    assert found[0]["sha256"] == found[1]["sha256"]
    assert found[0]["labels"] != found[1]["labels"]
    assert "labels" not in opened(folder(tmp_path / "a")).fingerprint()["splits"]["train"]
