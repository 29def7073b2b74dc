"""Makes the codecs of the core: ``zlib``, ``zstd``, ``aesgcm`` and ``offload``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pyworkflow.errors import ConfigurationError
from pyworkflow.spi import Codec, hookimpl


@hookimpl
def pyworkflow_make_codec(name: str, options: Mapping[str, str]) -> Codec | None:
    """Make a codec of the core, or None when it is another's.

    Raises:
        ConfigurationError: Its library is not installed, or its keys are of no use.
    """
    max_size = _number(name, options, "max_size")
    match name:
        case "zlib":
            from pyworkflow._codecs._compression import ZlibCodec

            return ZlibCodec(_number(name, options, "compress_threshold"), max_size)
        case "zstd":
            from pyworkflow._codecs._compression import ZstdCodec

            return ZstdCodec(_number(name, options, "compress_threshold"), max_size)
        case "aesgcm":
            from pyworkflow._codecs._encryption import AesGcmCodec
            from pyworkflow._config import parse_codec_keys, read_codec_keys

            given, file = options.get("keys", ""), options.get("keys_file", "")

            def keys() -> Mapping[str, bytes]:
                known = dict(parse_codec_keys(given, "codec_keys")) if given else {}
                for key_id, key in read_codec_keys(Path(file)) if file else ():
                    if known.setdefault(key_id, key) != key:
                        raise ConfigurationError(
                            f"one id has two codec keys: key_id={key_id} codec_keys_file={file}; "
                            "what one encrypts the other cannot read: give each key its own id"
                        )
                return known

            return AesGcmCodec(keys)
        case "offload":
            from pyworkflow._codecs._offload import OffloadCodec

            directory = options.get("offload_dir", "")
            threshold = _number(name, options, "offload_threshold")
            return OffloadCodec(Path(directory) if directory else None, threshold, max_size)
        case _:
            return None


def _number(name: str, options: Mapping[str, str], option: str) -> int:
    text = options[option]
    if not (text.isascii() and text.isdecimal()):
        raise ConfigurationError(
            f"an option of a codec is not a number: codec={name} {option}={text!r:.40}; "
            "write bytes, like 1024"
        )
    return int(text)
