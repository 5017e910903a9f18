"""What is said on stderr while something works: nothing ends where nobody hears it any more."""

import sys
from contextlib import suppress
from typing import TextIO

from tqdm import tqdm


class Unheard:
    """A stream that may be gone, as after Ctrl-C has ended `tee`, or a connection has ended: writing then does nothing.

    It equals the stream, by which tqdm knows the bars that a line goes between.
    """

    def __init__(self, stream: TextIO | None):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def __eq__(self, other) -> bool:
        return self._stream == getattr(other, "_stream", other)

    __hash__ = None

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError, AttributeError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError, AttributeError):
            self._stream.flush()


def say(text: str) -> None:
    """Write a line to stderr, between the bars that are there."""
    tqdm.write(text, file=Unheard(sys.stderr))


def progress(*args, **options) -> tqdm:
    """A bar of tqdm on stderr."""
    return tqdm(*args, file=Unheard(sys.stderr), **options)
