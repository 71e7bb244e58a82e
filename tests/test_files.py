"""Files are the old ones or the whole new ones."""

import json
import math
import os

import pytest

from nvae.files import read_bytes, read_json, read_yaml, replacing, write_json


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


def test_names_may_be_as_long_as_the_file_system_takes(tmp_path):
    path = tmp_path / ("a" * 251 + ".txt")
    with replacing(path) as temporary:
        temporary.write_text("whole")
    assert path.read_text() == "whole"


def test_what_is_no_regular_file_stays(tmp_path):
    """A device such as /dev/null would be gone."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "pipe", tmp_path / "folder"):
        with pytest.raises(OSError, match=f"^{path} is no regular file$"), replacing(path):
            pass
    assert sorted(each.name for each in tmp_path.iterdir()) == ["folder", "pipe"]
    assert (tmp_path / "pipe").is_fifo()


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


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no regular file"):
        read_bytes(tmp_path / "pipe", 10)
    with pytest.raises(ValueError, match="no regular file"):
        read_bytes("/dev/zero", 10)


def test_what_is_too_large_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(bytes(11))
    assert read_bytes(tmp_path / "a", 11) == bytes(11)
    with pytest.raises(ValueError, match="more than the 10 bytes"):
        read_bytes(tmp_path / "a", 10)


@pytest.mark.parametrize("depth", [60, 10_000, 300_000])
@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_nesting_is_bounded(tmp_path, read, depth):
    """Python's own readers raise a RecursionError, or take what later steps cannot walk."""
    (tmp_path / "a").write_text("[" * depth + "]" * depth)
    with pytest.raises(ValueError, match="deep"):
        read(tmp_path / "a")


def test_yaml_cannot_grow_by_aliases(tmp_path):
    (tmp_path / "a").write_text("a: &a [1, 2]\nb: [*a, *a, *a]\n")
    with pytest.raises(ValueError, match="aliases"):
        read_yaml(tmp_path / "a")


@pytest.mark.parametrize(
    "text",
    ["!!bool x", "!!timestamp x", "!!int ''", "!!binary x", "!!float x", "? [1]\n: 2", "!a b"],
)
def test_yaml_of_wrong_tags_is_a_value_error(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ValueError, match="is no YAML that can be read"):
        read_yaml(tmp_path / "x.yaml")
