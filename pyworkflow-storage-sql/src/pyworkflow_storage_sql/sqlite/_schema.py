"""Opening a database file: pragmas, numbered migrations, and what errors of SQLite mean."""

from __future__ import annotations

import errno
import os
import sqlite3
import tempfile
import time
from contextlib import closing
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Final
from urllib.parse import quote
from zlib import crc32

from pyworkflow.spi import (
    ConfigurationError,
    SchemaTooNew,
    StorageDamaged,
    StorageError,
    StorageFull,
    StorageUnavailable,
)
from pyworkflow.storekit import failpoints

__all__ = [
    "OPEN_TIMEOUT",
    "claim_namespace",
    "connect",
    "exists",
    "is_busy",
    "migrate",
    "pending",
    "storage_error",
]

failpoints.register(
    __name__,
    OSError,
    {"sqlite.migrating": "within a step of the schema's migration, a statement of it is done"},
)

#: Seconds that opening waits for another process's lock.
OPEN_TIMEOUT: Final = 30.0
#: "PyWf": tells a store from a database of somebody else.
_APPLICATION_ID: Final = 0x50795766
#: Bytes that are tried when a write has failed: more than a page of any database.
_PROBE: Final = 128 * 1024
_BUSY: Final = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_NO_ROOM: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DAMAGED: Final = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


@cache
def _migrations() -> list[tuple[int, str, str]]:
    folder = resources.files("pyworkflow_storage_sql.sqlite") / "migrations"
    found = sorted(
        (entry.name, entry.read_text(encoding="utf-8"))
        for entry in folder.iterdir()
        if entry.name.endswith(".sql")
    )
    return [(int(name[:4]), name.removesuffix(".sql"), text) for name, text in found]


def _make_private(path: Path) -> None:
    """Make a missing file for the owner alone; its ``-wal`` and ``-shm`` get its mode."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except OSError:  # it exists, or the connection tells what is wrong
        return


def connect(path: Path) -> sqlite3.Connection:
    """A connection for any thread, without a transaction of its own making.

    Raises:
        ConfigurationError: There cannot be a database at the path.
    """
    _check_place(path)
    _make_private(path)
    conn = sqlite3.connect(
        path,
        timeout=OPEN_TIMEOUT,
        isolation_level=None,
        check_same_thread=False,
        cached_statements=512,
    )
    try:
        _version(conn, path)  # what is refused stays as it is, to the byte
        mode = _write_ahead(conn)
        if mode != "wal":
            raise StorageError(
                f"the database cannot write ahead: path={path} journal_mode={mode}; "
                "is it on a network file system? Put it on a local disk"
            )
        conn.execute("pragma synchronous = full")
        conn.execute("pragma fullfsync = on")
        conn.execute("pragma cache_size = -16384")
        conn.execute("pragma temp_store = memory")
        conn.execute("pragma foreign_keys = off")
        conn.execute("pragma trusted_schema = off")
    except BaseException:
        conn.close()
        raise
    return conn


def _write_ahead(conn: sqlite3.Connection) -> str:
    """Switch the database to WAL; its mode then.

    The switch wants the database for itself, and does not wait for others that are opening it.
    """
    end = time.monotonic() + OPEN_TIMEOUT
    while True:
        try:
            mode: str = conn.execute("pragma journal_mode = wal").fetchone()[0]
        except sqlite3.OperationalError as error:
            if not is_busy(error) or time.monotonic() > end:
                raise
            time.sleep(0.005)
        else:
            return mode


def _check_place(path: Path) -> None:
    if path.is_dir():
        raise ConfigurationError(
            f"the database's path is a directory: path={path}; name a file in it"
        )
    if not path.parent.is_dir():
        raise ConfigurationError(
            f"the database's directory is not there: directory={path.parent}; make it first"
        )
    if not path.exists() and not os.access(path.parent, os.W_OK):
        raise ConfigurationError(
            f"the database's directory cannot be written: directory={path.parent}; "
            "give this user the right to write there"
        )
    if path.exists() and not os.access(path, os.W_OK):
        raise ConfigurationError(
            f"the database cannot be written: path={path}; give this user the right to write it"
        )


def _version(conn: sqlite3.Connection, path: Path) -> int:
    """The schema's version; 0 for an empty database."""
    if conn.in_transaction:
        application, version, tables = _marks(conn)
    else:
        # At one instant: another process may be making the tables.
        conn.execute("begin")
        try:
            application, version, tables = _marks(conn)
        finally:
            conn.execute("rollback")
    if application != _APPLICATION_ID:
        if tables or version or application:
            raise ConfigurationError(
                f"the file is a database of something else: path={path}; name another file"
            )
        return 0
    newest = _migrations()[-1][0]
    if version > newest:
        raise SchemaTooNew(str(path), version, newest)
    return version


def _marks(conn: sqlite3.Connection) -> tuple[int, int, int]:
    """Whose database it is, its version, and how many tables there are."""
    tables: int = conn.execute("select count(*) from sqlite_master").fetchone()[0]
    application: int = conn.execute("pragma application_id").fetchone()[0]
    version: int = conn.execute("pragma user_version").fetchone()[0]
    return application, version, tables


def migrate(conn: sqlite3.Connection, path: Path) -> None:
    """Bring the schema forward, in one transaction each; waits while another process does."""
    if _version(conn, path) == _migrations()[-1][0]:
        return
    for number, _, text in _migrations():
        conn.execute("begin immediate")
        try:
            if _version(conn, path) < number:
                for statement in _statements(text):
                    conn.execute(statement)
                    if failpoints.active:
                        failpoints.hit("sqlite.migrating")
                conn.execute(f"pragma application_id = {_APPLICATION_ID}")
                conn.execute(f"pragma user_version = {number}")
            conn.execute("commit")
        except BaseException:
            if conn.in_transaction:
                conn.execute("rollback")
            raise


def claim_namespace(conn: sqlite3.Connection, path: Path, name: str) -> tuple[int, int]:
    """The namespace's id and its count of news; makes its row when there is none.

    Raises:
        StorageDamaged: A namespace's name is not what was written: its runs would seem to be gone.
    """
    for found, crc in conn.execute("select name, name_crc from namespaces"):
        if crc32(found.encode()) != crc:
            raise StorageDamaged(str(path), 0, f"the name of a namespace: name={found!r}")
    find = "select id, work from namespaces where name = ?"
    row = conn.execute(find, (name,)).fetchone()
    if row is None:
        conn.execute(
            "insert or ignore into namespaces (name, name_crc) values (?, ?)",
            (name, crc32(name.encode())),
        )
        row = conn.execute(find, (name,)).fetchone()
    number, work = row
    return number, work


def _statements(text: str) -> list[str]:
    found: list[str] = []
    part = ""
    for line in text.splitlines(keepends=True):
        part += line
        if sqlite3.complete_statement(part):
            found.append(part)
            part = ""
    return found


def exists(path: Path) -> bool:
    """Whether the file has a store's tables; writes nothing, makes no file.

    Raises:
        ConfigurationError: It is a directory, or a database of something else.
        SchemaTooNew: A newer version made it.
    """
    if not path.exists():
        return False
    _check_place(path)
    # A connection that only reads would leave its log and shared memory beside the database.
    with closing(_existing(path, "rw")) as conn:
        return _version(conn, path) > 0


def _existing(path: Path, mode: str) -> sqlite3.Connection:
    """A connection that makes no file of a database."""
    return sqlite3.connect(f"file:{quote(str(path))}?mode={mode}", uri=True, timeout=OPEN_TIMEOUT)


def pending(path: Path, namespace: str) -> list[str]:
    """Names of the migrations that ``migrate`` would run; writes nothing, makes no file.

    The row of a namespace that nobody used before comes last.
    """
    version, known = 0, None
    if path.exists():
        _check_place(path)
        with closing(_existing(path, "ro")) as conn:
            version = _version(conn, path)
            if version:
                known = conn.execute(
                    "select id from namespaces where name = ?", (namespace,)
                ).fetchone()
    names = [name for number, name, _ in _migrations() if number > version]
    return names if known else [*names, f"namespace {namespace}"]


def is_busy(error: BaseException) -> bool:
    """Whether somebody else holds a lock."""
    return isinstance(error, sqlite3.OperationalError) and _code(error) in _BUSY


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _is_at_limit(error: sqlite3.Error, path: Path) -> bool:
    """Whether a write failed for a quota or a limit of the size of files.

    SQLite tells only ``ENOSPC`` from an I/O error. The next bytes of the largest file are tried
    in a file without a name.
    """
    if getattr(error, "sqlite_errorcode", 0) != sqlite3.SQLITE_IOERR_WRITE:
        return False
    try:
        files = [Path(f"{path.resolve()}{suffix}") for suffix in ("", "-wal")]
        end = max(file.stat().st_size for file in files)
        with tempfile.TemporaryFile(dir=files[0].parent) as probe:
            probe.seek(end)
            probe.write(bytes(_PROBE))
    except OSError as problem:
        return problem.errno in _NO_ROOM
    return False


def storage_error(error: BaseException, path: Path) -> BaseException:
    """What an error of SQLite or of the system means to a caller; others stay as they are."""
    if isinstance(error, OSError) and not isinstance(error, TimeoutError):
        if error.errno in _NO_ROOM:
            return _caused(StorageFull(f"no room is left: path={path}; make room"), error)
        return _caused(
            StorageUnavailable(f"the database cannot be used: path={path} error={error}"), error
        )
    if isinstance(error, UnicodeDecodeError):  # even the message of SQLite's error is damaged
        return _caused(StorageDamaged(str(path), 0, ascii(error.object)), error)
    if not isinstance(error, sqlite3.Error):
        return error
    code = _code(error)
    if code in _BUSY:
        made: StorageError = StorageUnavailable(
            f"another process holds the database's lock: path={path}; "
            "is one of its processes stopped? Send the same again"
        )
    elif code == sqlite3.SQLITE_FULL or _is_at_limit(error, path):
        made = StorageFull(
            f"no room is left for the database: path={path}; make room on the disk, in the quota "
            "or in the limit of the size of files. Nothing was written"
        )
    elif code in _DAMAGED or str(error).startswith("Could not decode"):
        made = StorageDamaged(str(path), 0, str(error))
    elif code == sqlite3.SQLITE_READONLY:
        return _caused(
            ConfigurationError(
                f"the database cannot be written: path={path} error={error}; "
                "give this user the right to write it and its directory"
            ),
            error,
        )
    elif code == sqlite3.SQLITE_CANTOPEN:
        made = StorageUnavailable(
            f"the database cannot be opened: path={path} error={error}; "
            "may this user write its directory?"
        )
    else:
        made = StorageUnavailable(
            f"the database failed, and it is unknown whether a change was written: path={path} "
            f"error={error}; send the same change again"
        )
    return _caused(made, error)


def _caused(made: BaseException, error: BaseException) -> BaseException:
    made.__cause__ = error
    return made
