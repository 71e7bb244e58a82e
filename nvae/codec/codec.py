"""Images to bytes and back, for Python."""

import io
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

import torch
from torch import Tensor

from nvae.codec.chain import (
    LARGEST_BLOCK,
    BlockSize,
    DamagedBlockError,
    Progress,
    decode_block,
    encode_block,
    images_of,
)
from nvae.codec.container import (
    Archive,
    ArchiveError,
    BlockPlace,
    Body,
    Header,
    ImageFile,
    from_bytes,
    write_block,
    write_header,
)
from nvae.codec.fingerprint import model_sha256, processor, software
from nvae.codec.pixels import level_type
from nvae.codec.walk import PassSettings, Walk
from nvae.models import MODELS, HierarchicalVAE
from nvae.settings import check_value

_BLOCK_LEVELS = 1 << 24
_MOST_IN_BLOCK = 16_384


class Codec:
    """Lossless compression of images by a model.

    An archive can be decoded with the same weights, the same versions of torch and constriction, on
    the same kind of processor; anything else is refused, and images that came out otherwise are
    never returned. The model runs on the CPU, as a copy.

    Args:
        model: in any mode, on any device; it is left as it is. No flows. One that knows classes
            is run without labels.
        batch_size: images in one pass, of encoding; an archive knows its own.
        threads: of the processor, likewise.
        precision: ``float32`` or ``float64``, likewise.
        block_images: images that lie on one stack: a longer chain is smaller and takes longer to
            read an image from. None: as many as have 2^24 gray levels, at most 16,384.
        checkpoint: name of the model's file, to be told by archives.

    Attributes:
        image_shape: ``(C, h, w)``: the window that the model's likelihood counts.
        bits: of a gray level.
        block_images: see above.

    Raises:
        ValueError: the model's images cannot be coded, or a setting is impossible.
        ModuleNotFoundError: constriction is not installed.
    """

    def __init__(
        self,
        model: HierarchicalVAE,
        *,
        batch_size: int = 16,
        threads: int = 1,
        precision: str = "float32",
        block_images: int | None = None,
        checkpoint: str = "",
    ) -> None:
        self._model = model
        self._settings = PassSettings(batch_size, threads, precision)
        self._walk = Walk(model, self._settings)
        self._sha256 = model_sha256(model)
        self._checkpoint = checkpoint
        self.image_shape, self.bits = self._walk.image_shape, self._walk.bits
        levels = math.prod(self.image_shape)
        if levels > LARGEST_BLOCK:
            raise ValueError(
                f"images of shape {self.image_shape} have more than the {LARGEST_BLOCK} values "
                "that can be coded"
            )
        if block_images is None:
            block_images = max(1, min(_MOST_IN_BLOCK, _BLOCK_LEVELS // levels))
        check_value("block_images", block_images, int, (1, LARGEST_BLOCK // levels))
        self.block_images = block_images

    def encode(self, images: Tensor) -> bytes:
        """An archive of images.

        Args:
            images: ``(N, C, h, w)``, gray levels from 0 to ``2**bits - 1``, as uint8, or as int32
                where they have more than 8 bits.

        Raises:
            ValueError: they are of another shape, type or range than the model's.
        """
        self.check(images)
        buffer = io.BytesIO()
        for _ in self.write(buffer, len(images), iter(images.split(self.block_images))):
            pass
        return buffer.getvalue()

    def decode(self, data: bytes, *, try_anyway: bool = False) -> Tensor:
        """The images of an archive, as :meth:`encode` takes them.

        Args:
            data: the archive.
            try_anyway: on another kind of processor, or with other versions, too: it may work, and
                where it does not this is an error, no other image.

        Raises:
            ArchiveError: it is none, damaged, of another model, or made elsewhere.
        """
        archive = from_bytes(data)
        walk = self.walk_for(archive, try_anyway=try_anyway)
        if archive.lost:
            raise ArchiveError(f"the archive is damaged: {archive.lost[0]}")
        blocks = []
        for place, _, found in self.read(archive, walk):
            if isinstance(found, DamagedBlockError):
                raise ArchiveError(f"block {place.number} of the archive: {found}")
            blocks.append(found)
        images = torch.cat(blocks)
        if len(images) != len(archive):
            raise ArchiveError(f"the archive has {len(images)} images, not {len(archive)}")
        return images

    def check(self, images: Tensor) -> None:
        """Raise a ValueError unless images are what :meth:`encode` takes."""
        dtype = level_type(self.bits)
        if images.dtype != dtype or images.ndim != 4 or not len(images):
            raise ValueError(
                f"images are {tuple(images.shape)} of {images.dtype}; (N, C, h, w) of {dtype} is "
                "needed, N at least 1"
            )
        if tuple(images.shape[1:]) != self.image_shape:
            raise ValueError(
                f"images have shape {tuple(images.shape[1:])}, the model codes {self.image_shape}"
            )
        low, high = (int(bound) for bound in images.aminmax())
        if low < 0 or high >= 2**self.bits:
            raise ValueError(
                f"images have the gray level {low if low < 0 else high}; the model codes 0 to "
                f"{2**self.bits - 1}"
            )

    def write(
        self,
        file: BinaryIO,
        count: int,
        blocks: Iterator[Tensor] | Iterator[tuple[Tensor, list[ImageFile]]],
        *,
        verify: bool = False,
        progress: Progress | None = None,
    ) -> Iterator[BlockSize]:
        """Write an archive block by block, each when its size is asked for.

        Args:
            file: where to.
            count: images in all blocks.
            blocks: images as :meth:`encode` takes, :attr:`block_images` at a time but for the last
                of them; with the files that they came from, or without.
            verify: decode every block again before it is written.
            progress: called with the images just done.

        Raises:
            ValueError: images that do not fit.
            ArchiveError: a block did not come back as it went in.
        """
        channels, height, width = self.image_shape
        config = self._model.config
        write_header(
            file,
            Header(
                model=self._sha256, family=MODELS.name_of(type(self._model)), channels=channels,
                height=height, width=width, bits=self.bits, likelihood=config.likelihood,
                images=count, blocks=-(-count // self.block_images), passes=self._settings,
                software=software(), processor=processor(), checkpoint=self._checkpoint,
            ),
        )  # fmt: skip
        first = 0
        for number, block in enumerate(blocks):
            images, files = block if isinstance(block, tuple) else (block, [])
            self.check(images)
            with self._walk.running():
                coded, size = encode_block(self._walk, images, progress)
                if verify:
                    _verify(self._walk, coded, images, number)
            write_block(file, number, first, Body(coded, files).to_bytes())
            first += len(images)
            yield size
        if first != count:
            raise ValueError(f"{first} images were to be coded, {count} were announced")

    def walk_for(self, archive: Archive, *, try_anyway: bool = False) -> Walk:
        """The model as it ran when an archive was made.

        Raises:
            ArchiveError: it is of another model, or was made elsewhere.
        """
        header, name = archive.header, archive.name
        if header.model != self._sha256:
            made_by = f" ({header.checkpoint})" if header.checkpoint else ""
            raise ArchiveError(
                f"{name} was made by another model: {header.family} {header.model[:12]}{made_by}; "
                f"this one is {MODELS.name_of(type(self._model))} {self._sha256[:12]}"
            )
        if header.image_shape != self.image_shape or header.bits != self.bits:
            raise ArchiveError(f"{name} is damaged: its images are not of the model's shape")
        for what, then, now in differences(header):
            if not try_anyway:
                raise ArchiveError(
                    f"{name} was made with {what} {then}, here it is {now}, and numbers may differ "
                    "in their last digits; decode it there, or try with try_anyway=true: wrong "
                    "images are refused"
                )
        if header.passes == self._settings:
            return self._walk
        return Walk(self._model, header.passes)

    def read(
        self,
        archive: Archive,
        walk: Walk,
        wanted: Callable[[range], bool] = lambda _: True,
        progress: Progress | None = None,
    ) -> Iterator[tuple[BlockPlace, Sequence[ImageFile], Tensor | DamagedBlockError]]:
        """Every block's place, files and images, or what is wrong with it.

        Args:
            archive: open.
            walk: of :meth:`walk_for`.
            wanted: whether a block of these images is; the others are passed over.
            progress: called with the number of images just done or passed over.
        """
        for place, body in archive.bodies():
            if isinstance(body, DamagedBlockError):
                yield place, [], body
                continue
            numbers = range(place.first_image, place.first_image + images_of(body.coded))
            if not wanted(numbers):
                if progress is not None:
                    progress(len(numbers))
                continue
            try:
                with walk.running():
                    images = decode_block(walk, body.coded, progress)
            except DamagedBlockError as error:
                yield place, body.files, error
            else:
                yield place, body.files, images


def differences(header: Header) -> Iterator[tuple[str, str, str]]:
    """What is another here than where an archive was made: its name, then and now."""
    here = {**software(), "processor": processor()}
    there = {**header.software, "processor": header.processor}
    for what in itertools.chain(here, sorted(there.keys() - here.keys())):
        if there.get(what) != here.get(what):
            yield what, there.get(what, "unknown"), here.get(what, "unknown")


def _verify(walk: Walk, coded: bytes, images: Tensor, number: int) -> None:
    try:
        same = torch.equal(decode_block(walk, coded), images)
    except DamagedBlockError:
        same = False
    if not same:
        raise ArchiveError(
            f"block {number} did not come back as it went in: this processor does not compute the "
            "same numbers twice; try threads=1"
        )
