"""The servers and the network that other tests build on: what they start, stop and leave behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.proxy import Proxy
from tests.servers import (
    GivenServer,
    PostgresServer,
    ServerFailed,
    ValkeyServer,
    shared_postgres,
    shared_valkey,
    until,
)
from tests.watched import stopped

ROOT = Path(__file__).parents[2]

# Starts both servers, says what there is to clean up, and waits to be killed.
STARTS_SERVERS = """
import signal
from tests.servers import PostgresServer, ValkeyServer, home
servers = [PostgresServer(), ValkeyServer()]
servers[0].pause()
print(home().path, *[pid for server in servers for pid in server.pids], flush=True)
signal.pause()
"""


def test_postgres_keeps_what_it_acknowledged_through_a_kill(make_postgres):
    server = make_postgres()
    url, port = server.url, server.port
    server.sql("CREATE TABLE told (n int); INSERT INTO told VALUES (1), (2)")
    before = server.pids
    server.kill()
    assert not server.running
    assert not any(_alive(pid) for pid in before)
    with pytest.raises(ServerFailed, match="refused"):
        server.sql("SELECT 1")
    server.start()
    assert (server.url, server.port) == (url, port)
    assert server.sql("SELECT n FROM told ORDER BY n") == "1\n2"
    assert server.sql("SHOW fsync") == "on"


def test_postgres_stops_in_order_and_starts_again(make_postgres):
    server = make_postgres({"synchronous_commit": "off"})
    assert server.sql("SHOW synchronous_commit") == "off"
    server.sql("CREATE TABLE told (n int)")
    server.stop()
    assert "database system is shut down" in server.log_text()
    server.start()
    assert server.sql("SELECT count(*) FROM told") == "0"


def test_postgres_demands_its_password(make_postgres):
    server = make_postgres(password=True)
    assert server.sql("SELECT 1") == "1"
    with pytest.raises(ServerFailed, match="password authentication failed"):
        server.sql("SELECT 1", url=server.url.replace(server.password, "other"))


def test_valkey_keeps_what_it_acknowledged_through_a_kill(make_valkey):
    server = make_valkey()
    url = server.url
    assert server.command("SET", "told", "abc") == "+OK"
    server.kill()
    with pytest.raises(ConnectionRefusedError):
        server.command("PING")
    server.start()
    assert server.url == url
    assert server.command("STRLEN", "told") == ":3"


def test_valkey_takes_settings_a_password_and_a_cluster(make_valkey):
    server = make_valkey({"maxmemory": "100mb"}, password=True)
    assert server.command("PING") == "+PONG"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"PING\r\n")
        assert b"NOAUTH" in connection.recv(100)
    cluster = make_valkey(cluster=True)
    assert cluster.command("SET", "{tag}one", "1") == "+OK"


@pytest.mark.parametrize("kind", [PostgresServer, ValkeyServer])
def test_a_paused_server_answers_after_it_resumes(kind):
    with kind() as server:
        ask = (
            (lambda: server.sql("SELECT 1"))
            if kind is PostgresServer
            else (lambda: server.command("PING"))
        )
        answer = ask()
        server.pause()
        assert all(stopped(psutil.Process(pid)) for pid in server.pids)
        server.resume()
        assert ask() == answer
        server.pause()
        server.stop()  # a paused server can be stopped
        assert not server.running


@pytest.mark.parametrize("kind", [PostgresServer, ValkeyServer])
def test_an_own_server_leaves_no_process_and_no_file(kind):
    with kind() as server:
        pids, folder = server.pids, server.folder
        assert all(_alive(pid) for pid in pids)
    assert not any(_alive(pid) for pid in pids)
    assert not folder.exists()


def test_nothing_stays_when_the_process_of_the_tests_is_killed():
    process = subprocess.Popen(
        [sys.executable, "-c", STARTS_SERVERS], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    folder, *pids = process.stdout.readline().split()
    assert len(pids) > 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    until(lambda: not Path(folder).exists(), "the folder is still there")
    assert not any(_alive(int(pid)) for pid in pids)


def test_shared_servers_are_the_same_at_every_call(postgres, valkey):
    assert shared_postgres() is postgres
    assert shared_valkey() is valkey
    one, two = postgres.database(), postgres.database()
    assert one != two
    assert postgres.sql("SELECT 1", url=one) == "1"


def test_a_given_url_takes_the_place_of_the_shared_server(monkeypatch):
    monkeypatch.setenv("PYWORKFLOW_TEST_POSTGRES", "postgresql://u:p@db.example/x")
    monkeypatch.setenv("PYWORKFLOW_TEST_REDIS", "redis://cache.example/0")
    given = shared_postgres.__wrapped__()
    assert isinstance(given, GivenServer)
    assert (given.url, given.password) == ("postgresql://u:p@db.example/x", "p")
    assert shared_valkey.__wrapped__().url == "redis://cache.example/0"


def test_a_server_that_cannot_start_says_why():
    with pytest.raises(ServerFailed, match="no_such_setting"):
        PostgresServer({"no_such_setting": "1"})


def test_the_proxy_passes_delays_and_counts(make_valkey, make_proxy):
    proxy = make_proxy(make_valkey().url)
    with _client(proxy) as client:
        assert _ask(client) == b"+PONG\r\n"
        proxy.delay = 0.05
        begin = time.monotonic()
        assert _ask(client) == b"+PONG\r\n"
        assert time.monotonic() - begin >= 0.1
    assert proxy.count == 1


def test_the_proxy_drops_refuses_and_heals(make_valkey, make_proxy):
    proxy = make_proxy(make_valkey().url)
    with _client(proxy) as client:
        assert _ask(client) == b"+PONG\r\n"
        proxy.drop()
        with pytest.raises(ConnectionResetError):
            client.recv(10)
    proxy.refuse()
    with pytest.raises(ConnectionError), _client(proxy) as client:
        client.recv(10)
    proxy.heal()
    with _client(proxy) as client:
        assert _ask(client) == b"+PONG\r\n"
        assert proxy.connections == 1


def test_the_proxy_holds_back_what_it_hides(make_valkey, make_proxy):
    proxy = make_proxy(make_valkey().url)
    with _client(proxy) as client:
        proxy.blackhole()
        client.sendall(b"PING\r\n")
        client.settimeout(0.1)
        with pytest.raises(TimeoutError):
            client.recv(10)
        client.settimeout(30)
        proxy.heal()
        assert client.recv(10) == b"+PONG\r\n"
        proxy.half_close()
        assert client.recv(10) == b""


def test_the_proxy_swallows_an_answer_to_work_that_was_done(make_valkey, make_proxy):
    server = make_valkey()
    proxy = make_proxy(server.url)
    with _client(proxy) as client:
        assert _ask(client) == b"+PONG\r\n"
        proxy.drop_before_answer()
        client.sendall(b"SET done 1\r\n")
        with pytest.raises(ConnectionResetError):
            client.recv(10)
    assert proxy.armed == 0
    assert server.command("EXISTS", "done") == ":1"


def _client(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=30)


def _ask(client: socket.socket) -> bytes:
    client.sendall(b"PING\r\n")
    return client.recv(7)


def _state(pid: int) -> str:
    return psutil.Process(pid).status()


def _alive(pid: int) -> bool:
    try:
        return os.getpid() != pid and _state(pid) != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
