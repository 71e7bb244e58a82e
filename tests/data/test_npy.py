"""Headers of array files: numpy's own are read, others are refused."""

import io

import numpy as np
import pytest

from nvae.data.npy import map_array, parse_header


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize(("shape", "dtype"), [((5, 8, 8, 3), "|u1"), ((4, 3), "<i8"), ((), "|u1")])
def test_headers_that_numpy_writes(tmp_path, shape, dtype, version):
    array = np.arange(int(np.prod(shape)), dtype=dtype).reshape(shape)
    path = tmp_path / "a.npy"
    with path.open("wb") as file:
        np.lib.format.write_array(file, array, version)
    header = parse_header(path.read_bytes(), (dtype,))
    assert (header.shape, header.dtype) == (shape, dtype)
    assert header.bytes == path.stat().st_size
    assert np.array_equal(map_array(path, dtype), array)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((2, 3), np.int8), "it holds '|i1', not |u1"),
        (np.zeros((2, 3), np.uint8, order="F"), "not in C order"),
        (np.array([{}]), "it holds '|O'"),
        (np.zeros(2, [("a", "u1")]), "it holds [('a', '|u1')]"),
    ],
)
def test_other_arrays_are_refused(array, words):
    file = io.BytesIO()
    np.save(file, array)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        parse_header(file.getvalue(), ("|u1",))
    assert words in str(error.value)


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: d + b"x", lambda d: d[:50]])
def test_a_file_of_another_length_than_its_header_says_is_refused(tmp_path, change):
    np.save(tmp_path / "a.npy", np.zeros((4, 3), np.uint8))
    data = change((tmp_path / "a.npy").read_bytes())
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(ValueError, match="header"):
        map_array(tmp_path / "a.npy", "|u1")
