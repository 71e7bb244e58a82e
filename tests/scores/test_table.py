"""Names, order and files of the scores."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from nvae.scores import Reference, ScoreRecords, image_columns, score_columns, write_table
from nvae.scores.figures import MapRow, save_histograms, save_maps


@pytest.fixture
def records():
    n = np.arange(4.0)
    return ScoreRecords(
        index=np.array([3, 5, 8, 9]),
        reconstruction=100 + n,
        kl_per_channel=np.stack([np.stack([n, n + 1], 1), np.stack([n + 2, n + 3], 1)], 1),
        log_evidence=-np.stack([90 + n, 80 + n], 1),
        effective_samples=np.stack([n + 1, n + 2], 1),
        partial_bounds=-np.stack([110 + n, 115 + 2 * n, 200 - n], 1),
    )


def test_scores_by_name(records):
    columns = score_columns(records, (5, 50), Reference(110.0, 7, "digits", "train"))
    assert list(columns) == [
        "negative_elbo", "reconstruction", "kl", "nll_5", "nll_50", "typicality", "llr_1", "llr_2"
    ]  # fmt: skip
    assert columns["kl"].tolist() == [6, 10, 14, 18]
    assert columns["negative_elbo"].tolist() == [106, 111, 116, 121]
    assert columns["typicality"].tolist() == [4, 1, 6, 11]  # too likely is not typical either
    assert columns["nll_50"].tolist() == [80, 81, 82, 83]
    assert columns["llr_1"].tolist() == [5, 6, 7, 8]
    assert columns["llr_2"].tolist() == [90, 88, 86, 84]
    assert "typicality" not in score_columns(records, (5, 50))


def test_a_row_an_image_with_every_digit(records, tmp_path):
    scores = score_columns(records, (5, 50))
    names = [f"{i}, odd.png" for i in range(10)]
    columns = image_columns(records, (5, 50), scores, names, list("abcdefghij"))
    columns["llr_1"] = columns["llr_1"] / 3
    write_table(tmp_path / "scores.csv", columns)
    with (tmp_path / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["index"] for row in rows] == ["3", "5", "8", "9"]
    assert rows[2]["file"] == "8, odd.png"
    assert rows[2]["label"] == "i"
    assert [float(rows[1][name]) for name in ("kl_0", "kl_1")] == [3, 7]
    assert float(rows[0]["effective_samples_50"]) == 2
    assert [float(row["llr_1"]) for row in rows] == columns["llr_1"].tolist()


def test_parquet_holds_the_same(records, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    names = ["a.png"] * 9 + ["b" * 1000]
    columns = image_columns(records, (5, 50), score_columns(records, (5, 50)), names)
    assert columns["file"].nbytes < 100  # and not as many of the longest name as there are images
    write_table(tmp_path / "scores.csv", columns)
    found = parquet.read_table(tmp_path / "scores.parquet").to_pydict()
    assert {name: list(each) for name, each in columns.items()} == found


def test_without_pyarrow_there_is_the_csv_alone(records, tmp_path, monkeypatch):
    monkeypatch.setattr("nvae.scores.table.find_spec", lambda _: None)
    write_table(tmp_path / "scores.csv", {"index": records.index})
    assert [path.name for path in tmp_path.iterdir()] == ["scores.csv"]


def test_pictures_are_drawn(tmp_path):
    """Of far outliers, of constant scores, of sets of unequal size, and of color."""
    generator = np.random.default_rng(0)
    own = {"a": generator.normal(size=50), "b": np.zeros(50), "c": -generator.random(50)}
    far = {name: 1e6 * values[:20] for name, values in own.items()}
    save_histograms(tmp_path / "h.png", {"own": own, "far": far})
    maps = -generator.random((3, 8, 4)) * 5
    rows = [MapRow(what, torch.rand(3, 3, 8, 4), maps, list("xyz")) for what in ("high", "low")]
    save_maps(tmp_path / "m.png", rows)
    for name in ("h.png", "m.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG"
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 20
