"""Files are the old ones or the whole new ones."""

import json
import math
import os

import pytest

from nvae.atomic import replacing, write_json


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_success_replaces_and_makes_folders(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with replacing(path) as temporary:
        assert temporary.suffix == ".txt"
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_files_have_the_usual_permissions(tmp_path):
    """A temporary file is private; a result that others cannot read is a nuisance."""
    ordinary = tmp_path / "ordinary"
    ordinary.write_text("")
    with replacing(tmp_path / "ours") as temporary:
        temporary.write_text("")
    assert os.stat(tmp_path / "ours").st_mode == os.stat(ordinary).st_mode


def test_json_is_valid_whatever_the_numbers(tmp_path):
    write_json(tmp_path / "a.json", {"a": math.nan, "b": [math.inf, 1.5], 3: ("x", None)})
    found = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert found == {"a": None, "b": [None, 1.5], "3": ["x", None]}
