"""The codec ``aesgcm``: authenticated encryption, with keys that can be changed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from pyworkflow.errors import ConfigurationError, PayloadUnreadable

__all__ = ["AesGcmCodec"]

_NONCE = 12


class AesGcmCodec:
    """AES-256-GCM with a random nonce. Writes with the first key, reads with any.

    The tag also covers the names of the codecs and the key's id, so that neither can be exchanged.
    It does not cover the run: a payload keeps its meaning when it is handed from run to run, from
    an event to a work item, or copied to another store.
    """

    secret = True
    blocking = False

    def __init__(self, keys: Callable[[], Mapping[str, bytes]]) -> None:
        try:
            from cryptography.exceptions import InvalidTag
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError as error:
            raise ConfigurationError(
                "the codec aesgcm needs a library: library=cryptography; "
                "pip install 'pyworkflow-core[codecs]', from a clone './pyworkflow-core[codecs]'"
            ) from error
        self._cipher: Any = AESGCM
        self._invalid: type[Exception] = InvalidTag
        self._load = keys
        self._keys = dict(keys())

    def check_writable(self) -> None:
        """Raise ``ConfigurationError`` when there is no key to write with."""
        if not self._keys:
            raise ConfigurationError(
                "the codec aesgcm has no key: set PYWORKFLOW_CODEC_KEYS=ID:BASE64 (32 bytes), or "
                "the setting codec_keys_file"
            )

    def encode(self, data: bytes, context: bytes) -> tuple[bytes, Mapping[str, str]] | None:
        """Encrypted under the first key, whatever its size."""
        self.check_writable()
        key_id, key = next(iter(self._keys.items()))
        nonce = os.urandom(_NONCE)
        sealed: bytes = self._cipher(key).encrypt(nonce, data, _bound(context, key_id))
        return nonce + sealed, {"k": key_id}

    def decode(self, data: bytes, context: bytes, params: Mapping[str, str]) -> bytes:
        """The bytes that were encrypted. ``PayloadUnreadable``, which names the key's id."""
        key_id = params.get("k", "")
        key = self._keys.get(key_id)
        if key is None:
            try:
                # A file may have it by now. What is known stays: another process may be writing
                # the file, and no key id is ever given to another key.
                found = dict(self._load())
                self._keys = {**found, **{k: v for k, v in self._keys.items() if k not in found}}
            except ConfigurationError as error:
                raise PayloadUnreadable("aesgcm", str(error), "repair it", key_id) from error
            key = self._keys.get(key_id)
        if key is None:
            raise PayloadUnreadable(
                "aesgcm",
                "the key is not known here",
                "add it to codec_keys or to the file codec_keys_file of this process, behind the "
                "key that is used for writing",
                key_id,
            )
        try:
            opened: bytes = self._cipher(key).decrypt(
                data[:_NONCE], data[_NONCE:], _bound(context, key_id)
            )
        except (self._invalid, ValueError):
            raise PayloadUnreadable(
                "aesgcm",
                "its bytes are damaged, or another key of this id encrypted them",
                "restore the key of this id, or the run from a copy of the store",
                key_id,
            ) from None
        return opened


def _bound(context: bytes, key_id: str) -> bytes:
    return context + json.dumps(["aesgcm", key_id]).encode()
