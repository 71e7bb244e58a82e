"""Records of images: each counted once, in the order of the index, rows kept together."""

import shutil

import numpy as np
import pytest

from nvae.evaluation.result import ImageRecords, RecordStore, concatenate


def _records(index):
    index = np.asarray(index, dtype=np.int64)
    number = index.astype(float)
    return ImageRecords(
        index,
        number,
        np.multiply.outer(number, np.ones((2, 3))),
        np.stack([number, number + 1], axis=1),
        np.stack([number, number + 2], axis=1),
    )


def test_parts_are_sorted_without_repetition_and_rows_stay_together():
    merged = concatenate([_records([4, 1]), _records([7, 4, 0])])
    assert merged.index.tolist() == [0, 1, 4, 7]
    assert merged.reconstruction.tolist() == [0, 1, 4, 7]
    assert merged.kl_per_channel[:, 1, 2].tolist() == [0, 1, 4, 7]
    assert merged.log_evidence[:, 1].tolist() == [1, 2, 5, 8]
    assert merged.effective_samples[:, 1].tolist() == [2, 3, 6, 9]


def test_nothing_to_merge_is_refused():
    with pytest.raises(ValueError, match="no images"):
        concatenate([])


def test_store_reads_back_what_it_wrote(tmp_path):
    store = RecordStore(tmp_path / "partial", "p")
    assert store.records is None
    store.save()
    assert not (tmp_path / "partial").exists()
    store.add(_records([3, 2]))
    store.save()
    again = RecordStore(tmp_path / "partial", "p")
    assert again.done == {2, 3}
    assert again.records.log_evidence.tolist() == [[2, 3], [3, 4]]


def test_a_folder_removed_while_it_is_written_to_costs_nothing(tmp_path, monkeypatch):
    """Two evaluations may share it; the one that finishes first removes it."""
    folder, write = tmp_path / "partial", np.savez_compressed
    store = RecordStore(folder, "p")
    store.add(_records([1]))

    def removed_once(file, **arrays):
        monkeypatch.setattr(np, "savez_compressed", write)
        write(file, **arrays)
        shutil.rmtree(folder)

    monkeypatch.setattr(np, "savez_compressed", removed_once)
    store.save()
    assert RecordStore(folder, "p").done == {1}
