"""CRC-32C against the published vectors of RFC 3720 and a bitwise reference."""

import numpy as np
import pytest

from nvae.data.readers.crc32c import crc32c, masked_crc32c
from tests.data.files import crc32c_reference, masked


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (b"123456789", 0xE3069283),
        (b"", 0),
    ],
)
def test_published_vectors(data, crc):
    assert crc32c(data) == crc


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 31, 33, 63, 64, 65, 1000, 4097])
def test_every_length_agrees_with_the_bitwise_form(length):
    data = np.random.default_rng(length).bytes(length)
    assert crc32c(data) == crc32c_reference(data)
    assert masked_crc32c(data).to_bytes(4, "little") == masked(data)
