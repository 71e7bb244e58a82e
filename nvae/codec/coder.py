"""The entropy coder: the stack of `constriction`, an asymmetric numeral system (Duda 2013).

What was pushed last is popped first. Popping what nobody pushed draws from the distribution, with
the stack's bits as the randomness, and pushing it again gives these bits back.
"""

import hashlib
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

STATE_WORDS = 2
"""Words of 32 bits that the coder's state holds; with no more the stack beneath it is empty."""

WORD = np.dtype("<u4")


class EmptyStackError(Exception):
    """More bits were popped than there are."""


def constriction() -> ModuleType:
    """The library.

    Raises:
        ModuleNotFoundError: it is not installed; one line says how to.
    """
    try:
        import constriction
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "compression needs the constriction package: pip install 'nvae[codec]'"
        ) from None
    return constriction


class Stack:
    """A stack of bits.

    Args:
        coder: the stack coder of the `constriction` library that holds the bits.
    """

    def __init__(self, coder: Any) -> None:
        models = constriction().stream.model
        self._coder = coder
        self._gaussian = models.QuantizedGaussian
        self._bernoulli = models.Bernoulli(perfect=False)

    @classmethod
    def holding(cls, content: bytes) -> "Stack":
        """A stack from which any content can be popped and found again by :meth:`content`."""
        padded = content + bytes(-len(content) % WORD.itemsize)
        words = np.frombuffer(padded, WORD).astype(np.uint32)
        return cls(constriction().stream.stack.AnsCoder(words, seal=True))

    @classmethod
    def of(cls, compressed: bytes) -> "Stack":
        """The stack whose :meth:`compressed` this is.

        Raises:
            ValueError: it is none.
        """
        words = np.frombuffer(compressed, WORD).astype(np.uint32)
        try:
            return cls(constriction().stream.stack.AnsCoder(words))
        except Exception as error:
            raise ValueError(f"it is no stack: {error}") from None

    def content(self) -> bytes:
        """Inverse of :meth:`holding`, up to three zeros at the end.

        Raises:
            ValueError: the stack is another one.
        """
        try:
            words: NDArray[np.uint32] = self._coder.get_compressed(unseal=True)
        except Exception as error:  # an AssertionError, for one
            raise ValueError(f"the stack holds something else: {error}") from None
        return words.astype(WORD).tobytes()

    def compressed(self) -> bytes:
        """All that is needed to go on elsewhere."""
        words: NDArray[np.uint32] = self._coder.get_compressed()
        return words.astype(WORD).tobytes()

    @property
    def bits(self) -> int:
        """Bits on the stack."""
        return int(self._coder.num_valid_bits())

    def pop_gaussian(
        self, limit: int, mean: NDArray[np.float64], std: NDArray[np.float64]
    ) -> NDArray[np.int32]:
        """Integers from ``-limit`` to ``limit``, one for every mean and standard deviation."""
        found: NDArray[np.int32] = self._coder.decode(self._gaussian(-limit, limit), mean, std)
        return found

    def push_gaussian(
        self,
        symbols: NDArray[np.int32],
        limit: int,
        mean: NDArray[np.float64],
        std: NDArray[np.float64],
    ) -> None:
        """Inverse of :meth:`pop_gaussian`."""
        self._coder.encode_reverse(symbols, self._gaussian(-limit, limit), mean, std)

    def pop_bits(self, probability: NDArray[np.float64]) -> NDArray[np.int32]:
        """Zeros and ones, given the probability of a one."""
        found: NDArray[np.int32] = self._coder.decode(self._bernoulli, probability)
        return found

    def push_bits(self, bits: NDArray[np.int32], probability: NDArray[np.float64]) -> None:
        """Inverse of :meth:`pop_bits`."""
        self._coder.encode_reverse(bits, self._bernoulli, probability)

    def whiten(self, number: int, words: int) -> None:
        """Exclusive-or of the uppermost words below the state with a key stream; its own inverse.

        Where a model does not fit its images, the bits that it pushed are not random, and what they
        draw is not from the posterior. As the key stream of a pass they are.

        Args:
            number: of the key stream.
            words: how many, or as many as there are.
        """
        content: NDArray[np.uint32] = self._coder.get_compressed()
        end = len(content) - STATE_WORDS
        start = max(0, end - words)
        if start < end:
            key = hashlib.shake_128(number.to_bytes(8, "little"))
            stream = np.frombuffer(key.digest(WORD.itemsize * (end - start)), WORD)
            content[start:end] ^= stream
            self._coder = constriction().stream.stack.AnsCoder(content)

    def check_not_empty(self) -> None:
        """Raise an EmptyStackError if pops may have found nothing beneath the coder's state."""
        if self._coder.num_words() <= STATE_WORDS:
            raise EmptyStackError
