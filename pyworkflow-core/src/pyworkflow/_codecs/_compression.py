"""The codecs ``zlib`` and ``zstd``. What they read back is bounded, whatever the text claims."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

from pyworkflow.errors import ConfigurationError, PayloadUnreadable

__all__ = ["ZlibCodec", "ZstdCodec"]

_DAMAGED = "restore the run from a copy of the store"
_BOMB = "raise the setting codec_max_size if it is yours"


class ZlibCodec:
    """DEFLATE, from the standard library."""

    secret = False
    blocking = False

    def __init__(self, threshold: int, max_size: int) -> None:
        self._threshold = threshold
        self._max_size = max_size

    def encode(self, data: bytes, context: bytes) -> tuple[bytes, Mapping[str, str]] | None:
        """Compressed, unless it is small or does not get smaller."""
        del context
        if len(data) < self._threshold:
            return None
        packed = zlib.compress(data, 6)
        return (packed, {}) if len(packed) < len(data) else None

    def decode(self, data: bytes, context: bytes, params: Mapping[str, str]) -> bytes:
        """The bytes that were compressed. ``PayloadUnreadable``."""
        del context, params
        engine = zlib.decompressobj()
        try:
            found = engine.decompress(data, self._max_size + 1)
        except zlib.error:
            raise PayloadUnreadable("zlib", "its bytes are damaged", _DAMAGED) from None
        if len(found) > self._max_size:
            raise _too_large("zlib", self._max_size)
        if not engine.eof or engine.unused_data:
            raise PayloadUnreadable("zlib", "its bytes are damaged", _DAMAGED)
        return found


class ZstdCodec:
    """Zstandard: faster and smaller than zlib; needs the library ``zstandard``."""

    secret = False
    blocking = False

    def __init__(self, threshold: int, max_size: int) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise ConfigurationError(
                "the codec zstd needs a library: library=zstandard; "
                "pip install 'pyworkflow-core[codecs]', from a clone './pyworkflow-core[codecs]'"
            ) from error
        self._zstd: Any = zstandard
        self._threshold = threshold
        self._max_size = max_size

    def encode(self, data: bytes, context: bytes) -> tuple[bytes, Mapping[str, str]] | None:
        """Compressed, unless it is small or does not get smaller."""
        del context
        if len(data) < self._threshold:
            return None
        # One compressor each: the library's objects are not for two threads at once.
        packed: bytes = self._zstd.ZstdCompressor(level=3, write_checksum=True).compress(data)
        return (packed, {}) if len(packed) < len(data) else None

    def decode(self, data: bytes, context: bytes, params: Mapping[str, str]) -> bytes:
        """The bytes that were compressed. ``PayloadUnreadable``."""
        del context, params
        try:
            # The size in the frame is a claim: it is looked at before room is made for it.
            claimed: int = self._zstd.frame_content_size(data)
            if claimed > self._max_size:
                raise _too_large("zstd", self._max_size)
            engine = self._zstd.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
            found: bytes = engine.decompress(data) if claimed >= 0 else b""
        except self._zstd.ZstdError:
            raise PayloadUnreadable("zstd", "its bytes are damaged", _DAMAGED) from None
        if claimed < 0 or len(found) != claimed or not engine.eof or engine.unused_data:
            raise PayloadUnreadable("zstd", "its bytes are damaged", _DAMAGED)
        return found


def _too_large(codec: str, limit: int) -> PayloadUnreadable:
    return PayloadUnreadable(codec, f"it unpacks to more than codec_max_size={limit} bytes", _BOMB)
