"""The archive's file format.

    8 bytes   magic number
    4, 4      length and CRC-32 of the header
              the header, JSON
    then every block:
    4 bytes   magic number
    4, 4, 8   number of the block, of its first image, length of its body
    4, 4      CRC-32 of the body, and of the 24 bytes before this one
              the body: length and text of the files' names and modes (JSON, LZMA, may be absent),
              then what :mod:`nvae.codec.chain` makes

Integers are little-endian. A block can be read without the others, and is found again after a
damaged one by its magic number and the CRC of its head.
"""

import io
import json
import lzma
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

from nvae.codec.chain import DamagedBlockError, images_of
from nvae.codec.walk import PassSettings
from nvae.command_line import brief
from nvae.files import open_regular
from nvae.settings import check_fields

VERSION = 1
MAGIC = b"\x89NVAE\r\n\x1a"
BLOCK = b"\x93blk"

LARGEST_HEADER = 1 << 16
LARGEST_BODY = 1 << 30
LARGEST_FILES = 1 << 26
"""Bytes of the text about a block's files, inflated."""
MOST_IMAGES = 1 << 31

_LENGTH_AND_CRC = struct.Struct("<II")
_HEAD = struct.Struct("<4sIIQI")
_CRC = struct.Struct("<I")
_LENGTH = struct.Struct("<I")
_PIECE = 1 << 20


class ArchiveError(ValueError):
    """An archive that is missing, damaged, of another format or model; one line says which."""

    def __init__(self, message: object) -> None:
        super().__init__(brief(message))


@dataclass(frozen=True)
class Header:
    """What an archive says of itself.

    Attributes:
        model: SHA-256 of the model; see :func:`nvae.codec.fingerprint.model_sha256`.
        family: name of the model's class.
        channels, height, width: of what is coded of an image.
        bits: of a gray level.
        likelihood: the model's.
        images: in all blocks.
        blocks: their number.
        passes: how the model ran.
        software: versions.
        processor: kind of processor.
        checkpoint: name of the file that the model came from, for people.
        version: of this format.
    """

    model: str
    family: str
    channels: int
    height: int
    width: int
    bits: int
    likelihood: str
    images: int
    blocks: int
    passes: PassSettings
    software: dict[str, str]
    processor: str
    checkpoint: str = ""
    version: int = VERSION

    def __post_init__(self) -> None:
        check_fields(
            self, "", channels=(1, 1024), height=(1, 4096), width=(1, 4096), bits=(1, 16),
            images=(1, MOST_IMAGES), blocks=(1, MOST_IMAGES),
        )  # fmt: skip
        if not all(isinstance(v, str) for pair in self.software.items() for v in pair):
            raise ValueError("software holds something else than versions")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, h, w)``."""
        return self.channels, self.height, self.width

    @property
    def pixels(self) -> int:
        """Dimensions of all images."""
        return self.images * math.prod(self.image_shape)


@dataclass(frozen=True)
class ImageFile:
    """The file that an image came from.

    Attributes:
        name: path below the folder, with ``/``.
        mode: Pillow's of a picture, such as ``RGB``, or the type and axes of an array; see
            :data:`nvae.codec.images.PICTURES` and :data:`nvae.codec.images.ARRAYS`.
        values: how gray levels stand in the file; see :data:`nvae.codec.images.VALUES`.
    """

    name: str
    mode: str
    values: str

    def __post_init__(self) -> None:
        check_fields(self, "")


@dataclass(frozen=True)
class Body:
    """A block's content.

    Attributes:
        coded: the images; see :func:`nvae.codec.chain.decode_block`.
        files: one for every image, or none at all.
    """

    coded: bytes
    files: list[ImageFile] = field(default_factory=list)

    def to_bytes(self) -> bytes:
        """The block as it is written.

        Raises:
            ValueError: the names of its files are too long to be read back.
        """
        text = b""
        if self.files:
            columns = {
                f.name: [getattr(file, f.name) for file in self.files] for f in fields(ImageFile)
            }
            plain = json.dumps(columns, separators=(",", ":")).encode()
            if len(plain) >= LARGEST_FILES:
                raise ValueError(
                    f"the names of {len(self.files)} files take {len(plain)} bytes in a block, "
                    f"more than {LARGEST_FILES}; give a smaller block_images"
                )
            text = lzma.compress(plain, lzma.FORMAT_ALONE)
        return _LENGTH.pack(len(text)) + text + self.coded

    @classmethod
    def from_bytes(cls, body: bytes) -> "Body":
        """Inverse of :meth:`to_bytes`.

        Raises:
            DamagedBlockError: it is none.
        """
        if len(body) < _LENGTH.size:
            raise DamagedBlockError("it is cut short")
        (length,) = _LENGTH.unpack_from(body)
        start = _LENGTH.size + length
        if start > len(body):
            raise DamagedBlockError("it is cut short")
        coded = body[start:]
        if not length:
            return cls(coded)
        try:
            # what it claims to need is held against a limit, and so is what comes out
            decompressor = lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=LARGEST_FILES)
            text = decompressor.decompress(body[_LENGTH.size : start], LARGEST_FILES)
            columns = json.loads(text)
            rows = zip(*(columns[f.name] for f in fields(ImageFile)), strict=True)
            files = [ImageFile(*row) for row in rows]
        except (ValueError, KeyError, TypeError, RecursionError, EOFError, lzma.LZMAError) as error:
            raise DamagedBlockError(f"the names of its files cannot be read: {error}") from None
        if len(files) != images_of(coded):
            raise DamagedBlockError(f"it has {len(files)} names for {images_of(coded)} images")
        return cls(coded, files)


def write_header(file: BinaryIO, header: Header) -> None:
    """Write what an archive begins with: the magic number, the header and its checksum."""
    text = json.dumps(asdict(header), separators=(",", ":")).encode()
    file.write(MAGIC + _LENGTH_AND_CRC.pack(len(text), zlib.crc32(text)) + text)


def write_block(file: BinaryIO, number: int, first_image: int, body: bytes) -> None:
    """Write a block, which stands after the header or after the block before it.

    Args:
        file: open, at the place.
        number: of the block, counted from 0.
        first_image: number of its first image in the archive.
        body: of :meth:`Body.to_bytes`.
    """
    head = _HEAD.pack(BLOCK, number, first_image, len(body), zlib.crc32(body))
    file.write(head + _CRC.pack(zlib.crc32(head)) + body)


@dataclass(frozen=True)
class BlockPlace:
    """Where a block is.

    Attributes:
        number: counted from 0.
        first_image: number of its first image.
        start: of its body, in bytes.
        length: of its body.
        crc: of its body.
    """

    number: int
    first_image: int
    start: int
    length: int
    crc: int


class Archive:
    """An archive, open for reading.

    Args:
        file: at its beginning; regular and seekable.
        name: for messages.

    Raises:
        ArchiveError: it is none, damaged in its header, or of a version that is not known.
    """

    def __init__(self, file: BinaryIO, name: str = "the archive") -> None:
        self._file, self.name = file, name
        self.size = file.seek(0, 2)
        file.seek(0)
        self.header = self._read_header()
        self.places, self.lost = self._find_blocks()

    @classmethod
    def open(cls, path: str | Path) -> "Archive":
        """The archive of a file, which stays open; use it as a context.

        Raises:
            ArchiveError: see there.
            OSError: it is not there or cannot be read.
        """
        try:
            file = open_regular(path)
        except ValueError as error:
            raise ArchiveError(error) from None
        try:
            return cls(file, str(path))
        except BaseException:
            file.close()
            raise

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return self.header.images

    def _read_header(self) -> Header:
        start = self._file.read(len(MAGIC) + _LENGTH_AND_CRC.size)
        if start[: len(MAGIC)] != MAGIC:
            raise ArchiveError(f"{self.name} is no archive of nvae")
        if len(start) < len(MAGIC) + _LENGTH_AND_CRC.size:
            raise ArchiveError(f"{self.name} is cut short")
        length, crc = _LENGTH_AND_CRC.unpack_from(start, len(MAGIC))
        if length > LARGEST_HEADER:
            raise ArchiveError(f"{self.name} is damaged: it claims a header of {length} bytes")
        text = self._file.read(length)
        if len(text) < length:
            raise ArchiveError(f"{self.name} is cut short")
        if zlib.crc32(text) != crc:
            raise ArchiveError(f"{self.name} is damaged: its header's checksum is another")
        try:
            return _header(json.loads(text))
        except (ValueError, TypeError, RecursionError) as error:
            raise ArchiveError(f"{self.name} has a header that is not valid: {error}") from None

    def _find_blocks(self) -> tuple[list[BlockPlace], list[str]]:
        """Every block whose head is whole, and what is wrong with the rest."""
        places: dict[int, BlockPlace] = {}
        lost: list[str] = []
        position = self._file.tell()
        while position < self.size:
            place = self._place_at(position)
            if place is None:
                following = self._next_head(position + 1)
                lost.append(f"bytes {position} to {following - 1} are no block")
                position = following
                continue
            if place.number < self.header.blocks:
                places.setdefault(place.number, place)
            position = place.start + place.length
        missing = self.header.blocks - len(places)
        if missing:
            lost.append(f"{missing} of {self.header.blocks} blocks are not there")
        return [places[number] for number in sorted(places)], lost

    def _place_at(self, position: int) -> BlockPlace | None:
        self._file.seek(position)
        head = self._file.read(_HEAD.size + _CRC.size)
        if len(head) < _HEAD.size + _CRC.size or not head.startswith(BLOCK):
            return None
        if _CRC.unpack_from(head, _HEAD.size)[0] != zlib.crc32(head[: _HEAD.size]):
            return None
        _, number, first_image, length, crc = _HEAD.unpack_from(head)
        start = position + len(head)
        if length > min(LARGEST_BODY, self.size - start):
            return None
        return BlockPlace(number, first_image, start, length, crc)

    def _next_head(self, position: int) -> int:
        """Where the next whole head begins; the file's end if nowhere."""
        while position < self.size:
            self._file.seek(position)
            piece = self._file.read(_PIECE)
            found = piece.find(BLOCK)
            if found < 0:
                position += max(1, len(piece) - len(BLOCK) + 1)
            elif self._place_at(position + found) is not None:
                return position + found
            else:
                position += found + 1
        return self.size

    def body(self, place: BlockPlace) -> Body:
        """A block's content.

        Raises:
            DamagedBlockError: its checksum is another, or its images are not as the header says.
        """
        self._file.seek(place.start)
        content = self._file.read(place.length)
        if len(content) < place.length or zlib.crc32(content) != place.crc:
            raise DamagedBlockError("its checksum is another")
        body = Body.from_bytes(content)
        if place.first_image + images_of(body.coded) > self.header.images:
            raise DamagedBlockError("it has more images than the header says")
        return body

    def bodies(self) -> Iterator[tuple[BlockPlace, Body | DamagedBlockError]]:
        """Every block in order, or what is wrong with it."""
        for place in self.places:
            try:
                yield place, self.body(place)
            except DamagedBlockError as error:
                yield place, error


def _header(values: Any) -> Header:
    if not isinstance(values, dict):
        raise ValueError("it is no JSON object")
    version = values.get("version")
    if version != VERSION:
        raise ValueError(f"it has version {version!r}, this version of nvae reads {VERSION}")
    passes = values.get("passes")
    if not isinstance(passes, dict) or not isinstance(values.get("software"), dict):
        raise ValueError("it lacks passes or software")
    return Header(**{**values, "passes": PassSettings(**passes)})


def from_bytes(data: bytes) -> Archive:
    """The archive that some bytes are."""
    return Archive(io.BytesIO(data))
