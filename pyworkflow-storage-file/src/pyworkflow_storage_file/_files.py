"""The files of one namespace: its directory, the manifest, the segments.

The manifest alone says which segments are the journal, so switching it switches everything.
Errors of the operating system pass through; the journal decides what they mean.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
from pathlib import Path
from typing import Final, NamedTuple

from pyworkflow.spi import (
    ConfigurationError,
    SchemaTooNew,
    StorageDamaged,
    StorageError,
    StorageFull,
)
from pyworkflow.storekit import failpoints
from pyworkflow_storage_file._calls import Calls

__all__ = [
    "Files",
    "Manifest",
    "has_store",
    "pack_name",
    "read_all",
    "segment_name",
    "storage_error",
]

_log = logging.getLogger("pyworkflow.storage.file")

failpoints.register(
    __name__,
    OSError,
    {"file.before_rename": "a new manifest is on disk, and the old one counts"},
)
failpoints.register(
    __name__, None, {"file.after_rename": "a new manifest counts, and may not survive power loss"}
)

#: Version of the manifest that this code writes, and the newest that it reads.
MANIFEST_FORMAT: Final = 2
_JOURNAL = re.compile(r"\d{6,}-p?\d{5,}\.jsonl")
"""What segments and packs are called."""
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Manifest(NamedTuple):
    """Which segments make up the journal, in order."""

    generation: int
    """How often the journal was rewritten, plus one."""
    segments: list[str]
    packs: list[str] = []  # noqa: RUF012 - a named tuple's default; nothing changes it
    """What earlier segments amount to, in order; read before the segments."""
    first: int = 1
    """The number of the first line of the first segment."""


class Files:
    """The files in ``directory``. Used by one thread at a time."""

    def __init__(self, directory: Path, *, namespace: str, sync: bool, calls: Calls) -> None:
        self.directory = directory
        self.manifest_path = directory / "manifest.json"
        self.poison_path = directory / "poisoned"
        self._namespace = namespace
        self._sync = sync
        self._calls = calls

    def copy(self) -> Files:
        """Another object for the same files."""
        return Files(self.directory, namespace=self._namespace, sync=self._sync, calls=self._calls)

    def make_directories(self) -> list[Path]:
        """Make the store's directories; returns the ones above whose names must be flushed."""
        root = self.directory.parent
        touched = [root, root.parent]
        try:
            if not self.directory.is_dir():
                if not root.is_dir():
                    touched += [path.parent for path in (root, *root.parents) if not path.exists()]
                    make_private(root)
                has_store(root)  # refuses the inside of another store
                if not any(root.iterdir()):  # else it is not the store's alone
                    with open(root / ".gitignore", "w", encoding="ascii", opener=_owner_only) as f:
                        f.write("*\n")
                self.directory.mkdir(mode=0o700, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ConfigurationError(
                f"the store's path is not a directory: path={root} file={error.filename}; "
                "name another directory, or move the file away"
            ) from error
        except OSError as error:
            raise storage_error("cannot make the store's directory", root, error) from error
        return touched

    def create(self) -> None:
        """Write the first manifest of a new store. With the lock held."""
        # An empty segment is what a process left that died right here; one with lines is a store's.
        strays = [path for path in self.directory.glob("*.jsonl") if path.stat().st_size]
        if strays:
            raise StorageDamaged(
                str(self.manifest_path), 0, f"it is missing, but {strays[0].name} is there"
            )
        name = segment_name(1, 1)
        fd = self.new_segment(name)
        try:
            self.flush(fd)
        finally:
            os.close(fd)
        self.switch(Manifest(1, [name]))

    def flush_names(self, *others: Path) -> None:
        """Return when the names in the directory, and in others, survive power loss."""
        if self._sync:
            for path in (self.directory, *others):
                self._calls.flush_directory(path)

    def new_segment(self, name: str) -> int:
        """Open a segment that is empty and not in the manifest yet."""
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        return os.open(self.directory / name, flags, self._mode())

    def _mode(self) -> int:
        """Of new files: 0600, or that of a store that was made otherwise, as others may share it."""
        try:
            return (self.directory / "lock").stat().st_mode & 0o666
        except OSError:
            return 0o600

    def open_segment(self, name: str) -> int:
        """Open a segment that the manifest names."""
        path = self.directory / name
        try:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise StorageDamaged(str(path), 0, "the manifest names it and it is missing") from None

    def read_manifest(self) -> Manifest:
        """The manifest as it stands.

        Raises:
            StorageDamaged: it is none.
            SchemaTooNew: a newer version wrote it.
        """
        path = self.manifest_path
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise StorageDamaged(str(path), 0, "the manifest is missing") from None
        try:
            manifest = json.loads(content)
            found = int(manifest["format"])
            if found > MANIFEST_FORMAT:
                raise SchemaTooNew(str(path), found, MANIFEST_FORMAT)
            segments = [str(name) for name in manifest["segments"]]
            if not segments or any("/" in name for name in segments):
                raise ValueError("segments")
            packs = [str(name) for name in manifest.get("packs", ())]
            if any("/" in name for name in packs):
                raise ValueError("packs")
            first = int(manifest.get("first", 1))
            return Manifest(int(manifest["generation"]), segments, packs, first)
        except (ValueError, TypeError, KeyError) as error:
            raise StorageDamaged(str(path), 0, f"no manifest: {error}") from error

    def switch(self, manifest: Manifest) -> None:
        """Switch to ``manifest`` in one step; ``flush_names`` makes it survive power loss."""
        described: dict[str, object] = {
            # Without packs, 0.1.0 can read it too.
            "format": MANIFEST_FORMAT if manifest.packs else 1,
            "namespace": self._namespace,
            "generation": manifest.generation,
            "segments": manifest.segments,
        }
        if manifest.packs or manifest.first != 1:
            described |= {"packs": manifest.packs, "first": manifest.first}
        content = json.dumps(described)
        new = self.manifest_path.with_suffix(".new")
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, self._mode())
        try:
            self.write(fd, content.encode() + b"\n", 0)
            self.flush(fd)
        finally:
            os.close(fd)
        self.flush_names()  # a segment's name must survive before a manifest that names it can
        if failpoints.active:
            failpoints.hit("file.before_rename")
        self._calls.replace(new, self.manifest_path)
        if failpoints.active:
            failpoints.hit("file.after_rename")

    def remove_leftovers(self) -> None:
        """Delete segments and packs that the manifest no longer names, or does not name yet.

        Only with the lock of packing held, or the pack of another process goes before it is named.
        """
        try:
            manifest = self.read_manifest()
            known = {*manifest.segments, *manifest.packs}
            for path in self.directory.glob("*.jsonl"):
                if path.name not in known:
                    path.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("cannot delete an old segment: path=%s: %s", self.directory, error)

    def write(self, fd: int, data: bytes, offset: int) -> None:
        """Write all of ``data``, or raise with some of it written."""
        done = self._calls.write(fd, data, offset)
        if done < len(data):
            view = memoryview(data)
            while done < len(data):
                done += self._calls.write(fd, view[done:], offset + done)

    def truncate(self, fd: int, length: int) -> None:
        """Cut a file off."""
        self._calls.truncate(fd, length)

    def flush(self, fd: int) -> None:
        """Return when a file survives power loss; at once when the store need not."""
        if self._sync:
            self._calls.flush(fd)

    def poison(self, reason: str) -> None:
        """Leave word that nobody may use the store, as far as the disk still takes it."""
        try:
            with open(self.poison_path, "wb", opener=_owner_only) as file:
                file.write(reason.encode("utf-8", "replace"))
            self._calls.flush_directory(self.directory)
        except OSError:
            pass  # the lock's marker says so too, and there is no third place


def storage_error(what: str, path: Path, error: OSError) -> StorageError:
    """The error of the contract for one of the operating system's."""
    facts = f"path={path} error={error.strerror or error} errno={error.errno}"
    if error.errno in _FULL:
        return StorageFull(
            f"{what}: no room is left: {facts}; nothing was written. Free some space, or purge"
        )
    return StorageError(f"{what}: {facts}; check the disk, and the permissions of the path")


def pack_name(generation: int, pack: int) -> str:
    """The file name of a pack that comes with a generation."""
    return f"{generation:06d}-p{pack:05d}.jsonl"


def segment_name(generation: int, segment: int) -> str:
    """The file name of a segment; they sort in order."""
    return f"{generation:06d}-{segment:06d}.jsonl"


def read_all(fd: int, offset: int, end: int | None = None) -> bytes:
    """What a file has from ``offset`` on, up to ``end``."""
    parts: list[bytes] = []
    most = 8 * 1024 * 1024
    while part := os.pread(fd, most if end is None else min(most, end - offset), offset):
        parts.append(part)
        offset += len(part)
    return b"".join(parts) if len(parts) != 1 else parts[0]


def has_store(root: Path) -> bool:
    """Whether there is a namespace of a store in the directory. Only reads.

    Raises:
        ConfigurationError: the directory is itself a namespace of a store.
        OSError: the directory cannot be read.
    """
    if any(_is_namespace(folder) for folder in root.iterdir()):
        return True
    if _is_namespace(root):
        raise ConfigurationError(
            f"the path is inside a store: path={root}; name the directory above it: {root.parent}"
        )
    return False


def _is_namespace(folder: Path) -> bool:
    """Whether the files of a journal are there, however damaged."""
    try:
        with os.scandir(folder) as entries:
            if any(_JOURNAL.fullmatch(entry.name) and entry.is_file() for entry in entries):
                return True
        manifest = json.loads((folder / "manifest.json").read_bytes())
        return isinstance(manifest, dict) and {"generation", "segments"} <= manifest.keys()
    except (OSError, ValueError):  # no directory, not ours to read, somebody else's manifest
        return False


def make_private(folder: Path) -> None:
    """Make a folder, and those above that are missing, for the owner alone."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)


def _owner_only(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
