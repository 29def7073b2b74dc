"""The codec ``offload``: large payloads as files of a directory that all workers share."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import re
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import cast

from pyworkflow._codecs._form import parse
from pyworkflow._serialization import is_wrapped
from pyworkflow.errors import (
    ConfigurationError,
    PayloadUnreadable,
    StorageError,
    StorageFull,
    StorageUnavailable,
)
from pyworkflow.spi.storage import RunQuery, StorageBackend

__all__ = ["ASIDE", "OffloadCodec", "sweep_offloaded"]

#: Characters of text from which on codecs work in a thread, beside the event loop.
ASIDE = 16 * 1024
_HASH = re.compile(r"[0-9a-f]{64}")
_PAGE = 100
#: A file on its way out: ``<name>.<random>.gone``.
_GONE = ".gone"
#: So often a file is looked for under both of its names.
_TRIES = 3
_FULL = (errno.ENOSPC, errno.EDQUOT)


class OffloadCodec:
    """Content-addressed files: ``<dir>/ab/abcdef…``, durable before the commit that names them."""

    secret = False

    def __init__(self, directory: Path | None, threshold: int, max_size: int) -> None:
        self._directory = directory
        self._threshold = threshold
        self._max_size = max_size
        self.blocking = threshold <= ASIDE

    def check_writable(self) -> None:
        """Raise ``ConfigurationError`` when there is no directory to write to."""
        if self._directory is None:
            raise ConfigurationError(
                "the codec offload has no directory: set PYWORKFLOW_CODEC_OFFLOAD_DIR to one that "
                "all workers share"
            )

    def encode(self, data: bytes, context: bytes) -> tuple[bytes, Mapping[str, str]] | None:
        """A reference to a file with the bytes, unless there are few."""
        del context
        if len(data) < self._threshold:
            return None
        self.check_writable()
        assert self._directory is not None
        name = sha256(data).hexdigest()
        try:
            _write(self._directory, name, data)
        except OSError as error:
            what = f"a payload cannot be offloaded: directory={self._directory}: {error.strerror}"
            if error.errno in _FULL:
                raise StorageFull(f"{what}; make room") from error
            raise StorageUnavailable(f"{what}; see to the directory") from error
        return b"", {"sha256": name, "size": str(len(data))}

    def decode(self, data: bytes, context: bytes, params: Mapping[str, str]) -> bytes:
        """The bytes of the file, if they are what was written. ``PayloadUnreadable``."""
        del data, context
        name, size = params.get("sha256", ""), params.get("size", "")
        if not _HASH.fullmatch(name) or not size.isdecimal() or len(size) > 18:
            raise PayloadUnreadable(
                "offload", "its reference is damaged", "restore the run from a copy of the store"
            )
        if self._directory is None:
            raise PayloadUnreadable(
                "offload",
                f"no directory is set here: file={name}",
                "set codec_offload_dir to the directory that all workers share",
            )
        if int(size) > self._max_size:
            raise PayloadUnreadable(
                "offload",
                f"the file has more than codec_max_size={self._max_size} bytes: size={size}",
                "raise the setting codec_max_size if it is yours",
            )
        path = _path(self._directory, name)
        try:
            found = _read(path, int(size) + 1)
        except OSError as error:
            raise PayloadUnreadable(
                "offload",
                f"its file cannot be read: file={path}: {error.strerror}",
                "mount the directory that all workers share, or restore the file from a copy",
            ) from error
        if len(found) != int(size) or sha256(found).hexdigest() != name:
            raise PayloadUnreadable(
                "offload", f"its file is damaged: file={path}", "restore the file from a copy"
            )
        return found


def _path(directory: Path, name: str) -> Path:
    return directory / name[:2] / name


def _read(path: Path, length: int) -> bytes:
    """The first bytes of a file, also while a sweep has it out of the way to see its age."""
    for _ in range(_TRIES):
        for each in itertools.chain([path], path.parent.glob(f"{path.name}.*{_GONE}")):
            try:
                with each.open("rb") as file:
                    return file.read(length)
            except FileNotFoundError:
                continue  # the sweep may have put it back, or taken it, just now
    with path.open("rb") as file:
        return file.read(length)


def _write(directory: Path, name: str, data: bytes) -> None:
    # Written even when a file of the name stands: that one may be damaged, or about to be swept.
    path = _path(directory, name)
    if not path.parent.is_dir():
        missing = [folder for folder in path.parents if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir(mode=0o700, exist_ok=True)
        _sync(path.parent.parent)
    half = path.with_name(f"{name}.{secrets.token_hex(6)}.part")
    try:
        with open(half, "xb", opener=lambda where, flags: os.open(where, flags, 0o600)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        half.replace(path)
    except BaseException:
        half.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(directory: Path) -> None:
    if os.name == "nt":
        return  # a directory cannot be opened there, and a rename is durable by itself
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


async def sweep_offloaded(
    *storages: StorageBackend,
    directory: Path,
    older_than: timedelta = timedelta(days=1),
    allow_empty: bool = False,
    dry_run: bool = False,
) -> list[Path]:
    """Remove files that no run refers to and that are older than ``older_than``; which.

    ``storages`` must be every store, in every namespace, that offloads to ``directory``. A file
    is written before the commit that refers to it: ``older_than`` must be longer than that takes,
    an hour at least. A store without any run is refused unless ``allow_empty``: it is more often
    the wrong one than one that refers to nothing. ``dry_run`` tells and removes nothing.

    Raises:
        ValueError: ``older_than`` is too short, or there is no store.
        StorageError: A store could not be read, or has no runs; nothing was removed.
    """
    if older_than < timedelta(hours=1) or not storages:
        raise ValueError("give every store of the directory, and older_than of an hour or more")
    before = time.time() - older_than.total_seconds()
    for storage in storages:
        if not allow_empty and not (await storage.list_runs(RunQuery(limit=1))).items:
            info = storage.info()
            raise StorageError(
                f"the store has no runs: location={info.location} namespace={info.namespace}; "
                "nothing was removed. Name the stores that use the directory, or say "
                "--allow-empty if this one is empty indeed"
            )
    old = await asyncio.to_thread(_older, directory, before, dry_run)
    used: set[str] = set()
    for storage in storages:
        async for name in _referred(storage):
            used.add(name)
    return await asyncio.to_thread(_remove, old, used, before, dry_run)


def _older(directory: Path, before: float, dry_run: bool) -> list[Path]:
    found: list[Path] = []
    for path in [*directory.glob("[0-9a-f][0-9a-f]/*")]:
        try:
            if path.suffix == _GONE:
                if not dry_run:
                    _put_back(path)  # a sweep that was killed left it
            elif path.is_file() and path.stat().st_mtime < before:
                found.append(path)
        except FileNotFoundError:
            continue  # another sweep has it
    return found


def _remove(old: list[Path], used: set[str], before: float, dry_run: bool) -> list[Path]:
    removed: list[Path] = []
    for path in old:
        name = path.name.partition(".")[0]
        if not _HASH.fullmatch(name) or (name in used and path.suffix != ".part"):
            continue
        try:
            if dry_run:
                removed += [path] if path.stat().st_mtime < before else []
                continue
            # Out of the way first: a worker that offloads the same bytes now makes the name anew,
            # and what it made before is seen by its time.
            gone = path.with_name(f"{path.name}.{secrets.token_hex(6)}{_GONE}")
            path.rename(gone)
            if gone.stat().st_mtime < before:
                gone.unlink()
                removed.append(path)
            else:
                _put_back(gone)
        except FileNotFoundError:
            continue  # another sweep has it
    return removed


def _put_back(gone: Path) -> None:
    path = gone.with_name(gone.name.rsplit(".", 2)[0])
    if path.exists():
        gone.unlink()  # equal: the name tells the content
    else:
        gone.replace(path)


async def _referred(storage: StorageBackend) -> AsyncIterator[str]:
    """The names of the files that the runs of a store refer to."""
    cursor: str | None = None
    while True:
        page = await storage.list_runs(RunQuery(limit=_PAGE), cursor)
        for run in page.items:
            error = None if run.error is None else run.error.to_json()
            for name in _names([run.args_text, run.result_text, error]):
                yield name
            after = 0
            while events := await storage.get_events(run.run_id, after=after, limit=1000):
                after = events[-1].seq
                for name in _names([event.data for event in events]):
                    yield name
            for item in await storage.list_work(run.run_id):
                for name in _names(item.payload):
                    yield name
        cursor = page.cursor
        if cursor is None:
            return


def _names(value: object) -> Iterator[str]:
    if isinstance(value, str):
        if is_wrapped(value):
            for codec, params in parse(value).codecs:
                if codec == "offload":
                    yield params.get("sha256", "")
    elif isinstance(value, Mapping):
        for entry in cast("Mapping[str, object]", value).values():
            yield from _names(entry)
    elif isinstance(value, list):
        for entry in cast("list[object]", value):
            yield from _names(entry)
