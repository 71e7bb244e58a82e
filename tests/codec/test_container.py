"""Archives that are cut, flipped, foreign, or made to do harm: one line, and no wrong pixels."""

import io
import json
import struct
import zlib
from dataclasses import replace

import pytest
import torch

from nvae.codec.__main__ import main as info
from nvae.codec.chain import DamagedBlockError, decode_block
from nvae.codec.codec import Codec
from nvae.codec.container import (
    MAGIC,
    Archive,
    ArchiveError,
    Body,
    ImageFile,
    from_bytes,
    write_block,
)

from .models import flipped, images_for, model_of

HEAD = 28  # bytes of a block before its body


@pytest.fixture(scope="module")
def codec():
    return Codec(model_of("nvae", likelihood="logistic_mixture", bits=4), block_images=20)


@pytest.fixture(scope="module")
def images(codec):
    return images_for(codec, 60)


@pytest.fixture(scope="module")
def data(codec, images):
    return codec.encode(images)


def _with_header(data: bytes, **changes: object) -> bytes:
    length = struct.unpack_from("<I", data, len(MAGIC))[0]
    start = len(MAGIC) + 8
    header = {**json.loads(data[start : start + length]), **changes}
    text = json.dumps(header).encode()
    return MAGIC + struct.pack("<II", len(text), zlib.crc32(text)) + text + data[start + length :]


def _check(data: bytes) -> None:
    """Raise an ArchiveError for what would be noticed before a pixel is decoded."""
    archive = from_bytes(data)
    faults = [body for _, body in archive.bodies() if isinstance(body, DamagedBlockError)]
    if archive.lost or faults:
        raise ArchiveError([*archive.lost, *faults][0])


def test_every_cut_is_noticed(codec, data):
    for length in range(0, len(data), 3):
        with pytest.raises(ArchiveError):
            _check(data[:length])
    with pytest.raises(ArchiveError):
        codec.decode(data[:-1])


def test_every_flipped_bit_is_noticed(codec, data):
    _check(data)
    for position in range(0, len(data), 3):
        with pytest.raises(ArchiveError) as error:
            _check(flipped(data, position))
        assert "\n" not in str(error.value)
    with pytest.raises(ArchiveError, match="block 0"):
        codec.decode(flipped(data, from_bytes(data).places[0].start + 100))


@pytest.mark.parametrize("where", ["magic", "length", "body"])
def test_one_bad_block_does_not_lose_the_others(codec, images, data, where):
    place = from_bytes(data).places[1]
    position = {"magic": -HEAD, "length": -12, "body": 50}[where]
    archive = from_bytes(flipped(data, place.start + position))
    good = {
        place.first_image: found
        for place, _, found in codec.read(archive, codec.walk_for(archive))
        if not isinstance(found, DamagedBlockError)
    }
    assert sorted(good) == [0, 40]
    for first, found in good.items():
        assert torch.equal(found, images[first : first + 20])


def test_blocks_are_read_alone(codec, images, data):
    archive = from_bytes(data)
    read = list(codec.read(archive, codec.walk_for(archive), lambda numbers: 25 in numbers))
    assert [place.number for place, _, _ in read] == [1]
    assert torch.equal(read[0][2], images[20:40])


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"version": 2}, "version 2"),
        ({"images": -1}, "images is -1"),
        ({"images": 10**30}, "images is"),
        ({"width": "8"}, "width='8'"),
        ({"height": 5000}, "height is 5000"),
        ({"bits": 17}, "bits is 17"),
        ({"bits": 12}, "not of the model's shape"),
        ({"passes": {"batch_size": 10**9}}, "batch_size is"),
        ({"passes": {"threads": 10**6}}, "threads is"),
        ({"passes": []}, "lacks passes"),
        ({"more": 1}, "more"),
        ({"software": {"torch": 1}}, "software"),
        ({"width": 16}, "not of the model's shape"),
        ({"images": 61}, "60 images, not 61"),
        ({"images": 59}, "more images than the header says"),
        ({"blocks": 4}, "1 of 4 blocks are not there"),
        ({"model": "0" * 64}, "another model"),
    ],
)
def test_headers_that_lie(codec, data, changes, line):
    with pytest.raises(ArchiveError, match=line):
        codec.decode(_with_header(data, **changes))


def test_a_header_that_claims_the_moon(codec):
    with pytest.raises(ArchiveError, match="claims a header of"):
        codec.decode(MAGIC + struct.pack("<II", 2**32 - 1, 0) + b"x" * 100)


@pytest.mark.parametrize("data", [b"", b"\x89", b"\x89PNG\r\n\x1a\n" + bytes(100), MAGIC])
def test_foreign_files(codec, data):
    with pytest.raises(ArchiveError, match=r"no archive of nvae|cut short"):
        codec.decode(data)


def test_blocks_that_lie(codec, data):
    """Every integer of a block's beginning, with a checksum that fits: no crash, no long work."""
    archive = from_bytes(data)
    coded = archive.body(archive.places[0]).coded
    with codec._walk.running():
        for place in range(5):
            for value in (0, 1, 2**16, 2**32 - 1):
                changed = bytearray(coded)
                if struct.unpack_from("<I", coded, 4 * place)[0] == value:
                    continue
                struct.pack_into("<I", changed, 4 * place, value)
                with pytest.raises(DamagedBlockError):
                    decode_block(codec._walk, bytes(changed))
        for position in range(24, len(coded), 150):  # what follows: digest, runs, lattices, stack
            with pytest.raises(DamagedBlockError):
                decode_block(codec._walk, flipped(coded, position))


def test_names_that_unpack_to_more_than_names_do(monkeypatch):
    file = ImageFile("a.png", "L", "full")
    body = Body(struct.pack("<I", 3) + bytes(30), [file] * 3)
    written = body.to_bytes()
    assert Body.from_bytes(written) == body
    monkeypatch.setattr("nvae.codec.container.LARGEST_FILES", 20)
    with pytest.raises(DamagedBlockError, match="names"):
        Body.from_bytes(written)
    with pytest.raises(ValueError, match="smaller block_images"):  # nor are they written
        body.to_bytes()
    monkeypatch.undo()
    with pytest.raises(DamagedBlockError, match="3 names for 4 images"):
        Body.from_bytes(replace(body, coded=struct.pack("<I", 4) + bytes(30)).to_bytes())


def test_a_body_that_claims_more_than_the_file(data):
    buffer = io.BytesIO()
    write_block(buffer, 0, 0, b"x" * 1000)
    start = from_bytes(data).places[0].start - HEAD
    archive = from_bytes(data[:start] + buffer.getvalue()[:-1])
    assert not archive.places
    assert "3 of 3 blocks are not there" in archive.lost[-1]


def test_info(tmp_path, capsys, data):
    (tmp_path / "a.nvae").write_bytes(data)
    info(["info", str(tmp_path / "a.nvae")])
    said = capsys.readouterr().out
    assert "60 of 8x8, 1 channels, 4 bits" in said
    assert "the same" in said
    (tmp_path / "b.nvae").write_bytes(flipped(data, len(data) - 5))
    for name, line in (("b.nvae", "block 2: its checksum is another"), ("c.nvae", "c.nvae")):
        with pytest.raises(SystemExit, match="2"):
            info(["info", str(tmp_path / name)])
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert line in error
        assert error.count("\n") == 1


def test_no_archive_but_a_pipe(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArchiveError, match="pipe"):
        Archive.open(tmp_path / "pipe")
