"""The journal by itself: lines, tails, damage, failing disks, generations."""

import errno
import json
import os
import re

import pytest

from pyworkflow.spi import (
    ConfigurationError,
    SchemaTooNew,
    StorageDamaged,
    StorageError,
    StorageFull,
)
from pyworkflow_storage_file import _lines
from pyworkflow_storage_file._calls import Calls
from pyworkflow_storage_file._journal import Journal
from pyworkflow_storage_file._records import Record


class Memory:
    """A sink that keeps the records as they come."""

    def __init__(self):
        self.records = []
        self.resets = 0
        self.latest = 0
        self.segment = ""

    def reset(self):
        self.records = []
        self.resets += 1

    def load(self, kind, body):
        self.records.append(json.loads(body)["i"])

    def load_pack(self, pack, line):
        raise AssertionError("these journals have no packs")

    def exchange(self, packs, came, went, first):
        raise AssertionError("these journals have no packs")


class Failing(Calls):
    """Raises ``code`` from the named calls while ``left`` is above zero."""

    def __init__(self):
        self.fail = {}
        self.flushes = 0

    def arm(self, name, code, times=10**9):
        self.fail[name] = [code, times]

    def _check(self, name):
        armed = self.fail.get(name)
        if armed is not None and armed[1] > 0:
            armed[1] -= 1
            raise OSError(armed[0], os.strerror(armed[0]))

    def write(self, fd, data, offset):
        armed = self.fail.get("write")
        if armed is not None and armed[1] > 0 and len(data) > 1:
            super().write(fd, bytes(data)[: len(data) // 2], offset)  # a short write comes first
        self._check("write")
        return super().write(fd, data, offset)

    def truncate(self, fd, length):
        self._check("truncate")
        super().truncate(fd, length)

    def flush(self, fd):
        self.flushes += 1
        self._check("flush")
        super().flush(fd)

    def flush_directory(self, path):
        self._check("flush_directory")
        super().flush_directory(path)

    def replace(self, source, target):
        self._check("replace")
        super().replace(source, target)


class Store:
    """A journal with its sink, and writes of one number each."""

    def __init__(self, path, **options):
        self.sink = Memory()
        self.calls = Failing()
        self.journal = Journal(path / "default", self.sink, calls=self.calls, **options)

    def open(self):
        self.journal.open()
        return self

    def put(self, *numbers, durable=True):
        self.journal.acquire()
        try:
            records = [Record(b"delta", b'{"i":%d,"t":"\xc3\xa9"}' % n) for n in numbers]
            self.journal.append(records, durable=durable)
            self.sink.records.extend(numbers)
        except StorageError:
            self.journal.invalidate()
            raise
        finally:
            self.journal.release()

    def get(self):
        if not self.journal.is_current():
            self.journal.acquire()
            self.journal.release()
        return self.sink.records

    def close(self):
        self.journal.close()

    def segment(self):
        return max(self.journal.directory.glob("*.jsonl"))


@pytest.fixture
def stores(tmp_path):
    opened = []

    def make(**options):
        store = Store(tmp_path, **options).open()
        opened.append(store)
        return store

    yield make
    for store in opened:
        store.close()


# --- lines ------------------------------------------------------------------------------------


def test_a_line_is_json_with_length_and_checksum():
    line = _lines.encode(7, 4096, b"delta", b'{"x":"\\n"}')
    assert line.endswith(b"}\n")
    assert line.count(b"\n") == 1
    shown = json.loads(line)
    assert (shown["v"], shown["n"], shown["s"], shown["l"], shown["k"]) == (1, 7, 4096, 10, "delta")
    assert shown["d"] == {"x": "\n"}
    parsed = _lines.parse(line, 0, len(line))
    assert parsed.body == b'{"x":"\\n"}'
    assert (parsed.number, parsed.synced, parsed.end) == (7, 4096, len(line))


def test_every_flipped_bit_of_a_line_is_noticed():
    line = _lines.encode(12, 345, b"delta", b'{"i":1,"s":"text"}')
    for place in range(len(line)):
        for bit in range(8):
            bad = bytearray(line)
            bad[place] ^= 1 << bit
            with pytest.raises(_lines.Damage):
                list(_lines.scan(bytes(bad), 0, 12))


def test_a_line_left_out_is_noticed():
    lines = [_lines.encode(n, 0, b"delta", b"{}") for n in (1, 2, 3)]
    with pytest.raises(_lines.Damage, match="missing"):
        list(_lines.scan(lines[0] + lines[2], 0, 1))


def test_an_intact_line_of_a_newer_format_is_told_from_damage():
    line = _lines.encode(1, 0, b"delta", b"{}")
    newer = line.replace(b'{"v":1', b'{"v":2')
    with pytest.raises(_lines.Damage):
        list(_lines.scan(newer, 0, 1))
    head = newer.split(b',"c"')[0]
    newer = newer.replace(
        re.search(rb'"c":"(\w+)"', newer)[1], b"%08x" % _lines.crc32(b"{}", _lines.crc32(head))
    )
    with pytest.raises(_lines.TooNew):
        list(_lines.scan(newer, 0, 1))


# --- reading and writing ----------------------------------------------------------------------


def test_what_was_written_is_read_again(stores):
    first = stores()
    first.put(1)
    first.put(2, 3)
    first.close()
    assert stores().get() == [1, 2, 3]


def test_two_journals_see_each_other(stores):
    one, two = stores(), stores()
    for n in range(20):
        (one, two)[n % 2].put(n)
        assert one.get() == two.get() == list(range(n + 1))
    assert one.sink.resets == two.sink.resets == 1


def test_the_directory_ignores_itself_in_git(stores, tmp_path):
    stores()
    assert (tmp_path / ".gitignore").read_text() == "*\n"


def test_segments_roll_and_everybody_follows(stores):
    one, two = stores(segment_bytes=300), stores(segment_bytes=300)
    for n in range(40):
        (one, two)[n % 3 == 0].put(n)
    assert one.get() == two.get() == list(range(40))
    assert len(list(one.journal.directory.glob("*.jsonl"))) > 5
    assert stores().get() == list(range(40))
    assert one.sink.resets == two.sink.resets == 1


def test_only_durable_writes_are_flushed(stores):
    store = stores()
    before = store.calls.flushes
    store.put(1, durable=False)
    assert store.calls.flushes == before
    store.put(2, 3, 4)
    assert store.calls.flushes == before + 1


def test_without_sync_nothing_is_flushed(stores):
    store = stores(sync=False)
    store.put(1)
    store.put(2)
    assert store.calls.flushes == 0
    assert stores().get() == [1, 2]


# --- tails ------------------------------------------------------------------------------------


@pytest.mark.parametrize("marker", ["kept", "lost", "stale"])
def test_f30_a_last_line_cut_at_any_byte_is_dropped_and_the_rest_is_kept(tmp_path, marker):
    store = Store(tmp_path).open()
    store.put(1)
    stale = store.journal.lock.path.read_bytes()
    store.put(2)
    whole = store.segment().read_bytes()
    store.put(3)
    store.close()
    content = store.segment().read_bytes()
    lock = {"kept": store.journal.lock.path.read_bytes(), "lost": b"", "stale": stale}[marker]
    for length in range(len(whole), len(content)):
        store.segment().write_bytes(content[:length])
        store.journal.lock.path.write_bytes(lock)
        again = Store(tmp_path).open()
        assert again.get() == [1, 2], length
        assert again.segment().read_bytes() == whole
        again.put(4)
        again.close()
        assert json.loads(again.segment().read_bytes().splitlines()[-1])["n"] == 3


def test_f30_the_cut_is_flushed_before_anything_else(tmp_path):
    store = Store(tmp_path).open()
    store.put(1)
    store.put(2)
    store.close()
    path = store.segment()
    path.write_bytes(path.read_bytes()[:-5])
    again = Store(tmp_path)
    again.open()
    assert again.calls.flushes >= 2  # before reading, and after the cut
    assert again.get() == [1]
    again.close()


def test_h16_a_tail_torn_while_others_have_the_store_open_is_dropped_before_they_append(stores):
    one, two = stores(), stores()
    one.put(1)
    two.get()
    with one.segment().open("ab") as file:
        file.write(_lines.encode(2, 0, b"delta", b'{"i":2}')[:-4])  # a writer killed on the way
    two.put(3)
    assert two.get() == one.get() == [1, 3]
    assert stores().get() == [1, 3]


def test_h16_what_a_dead_writer_left_is_flushed_before_it_is_believed(stores):
    one, two = stores(), stores()
    one.put(1)
    two.get()
    line = _lines.encode(2, 0, b"delta", b'{"i":2}')
    with one.segment().open("ab") as file:
        file.write(line)  # written, and killed before the flush
    before = two.calls.flushes
    assert two.get() == [1, 2]
    assert two.calls.flushes == before + 1
    before = one.calls.flushes
    assert one.get() == [1, 2]
    assert one.calls.flushes == before  # the next one finds it left in order


def test_h16_pages_of_the_last_write_that_came_to_the_disk_in_any_order_are_dropped(tmp_path):
    store = Store(tmp_path).open()
    store.put(1)
    length = store.segment().stat().st_size
    store.put(2, 3, 4)
    store.close()
    content = bytearray(store.segment().read_bytes())
    content[length + 3 : length + 40] = bytes(37)  # power loss: line 2 is gone, 3 and 4 are there
    store.segment().write_bytes(content)
    store.journal.lock.path.write_bytes(b"")
    again = Store(tmp_path).open()
    assert again.get() == [1]
    again.close()


# --- damage -----------------------------------------------------------------------------------


@pytest.mark.parametrize("marker", ["kept", "lost"])
def test_f31_a_bit_flipped_in_the_middle_names_file_and_offset_and_changes_nothing(
    tmp_path, marker
):
    store = Store(tmp_path).open()
    ends = []
    for n in range(4):
        store.put(n)
        ends.append(store.segment().stat().st_size)
    store.close()
    if marker == "lost":
        store.journal.lock.path.write_bytes(b"")
    content = store.segment().read_bytes()
    for place in range(ends[0], ends[2], 3):
        bad = bytearray(content)
        bad[place] ^= 0x10
        store.segment().write_bytes(bad)
        again = Store(tmp_path)
        with pytest.raises(StorageDamaged) as caught:
            again.open()
        assert caught.value.file == str(store.segment())
        assert caught.value.offset == (ends[0] if place < ends[1] else ends[1])
        assert store.segment().read_bytes() == bad


def test_f31_damage_of_the_last_acknowledged_line_is_no_torn_tail(tmp_path):
    store = Store(tmp_path).open()
    store.put(1)
    offset = store.segment().stat().st_size
    store.put(2)
    store.close()
    content = bytearray(store.segment().read_bytes())
    content[-10] ^= 1
    store.segment().write_bytes(content)
    with pytest.raises(StorageDamaged) as caught:
        Store(tmp_path).open()
    assert caught.value.offset == offset


def test_f31_a_live_journal_refuses_damage_in_what_others_appended(stores):
    one, two = stores(), stores()
    one.put(1)
    offset = one.segment().stat().st_size
    one.put(2)
    one.put(3)
    with one.segment().open("r+b") as file:
        file.seek(offset + 20)
        file.write(b"?")
    for _ in range(2):
        with pytest.raises(StorageDamaged) as caught:
            two.get()
        assert caught.value.offset == offset


def test_a_record_that_does_not_load_is_damage(tmp_path):
    store = Store(tmp_path).open()
    store.put(1)
    store.journal.acquire()
    store.journal.append([Record(b"delta", b'{"other":1}')], durable=True)
    store.journal.release()
    store.close()
    with pytest.raises(StorageDamaged, match="KeyError"):
        Store(tmp_path).open()


def test_segments_without_a_manifest_are_no_empty_store(tmp_path):
    store = Store(tmp_path).open()
    store.put(1)
    store.close()
    manifest = store.journal.directory / "manifest.json"
    manifest.rename(tmp_path / "aside")
    with pytest.raises(StorageDamaged, match=r"manifest\.json"):
        Store(tmp_path).open()
    assert store.segment().exists()
    (tmp_path / "aside").rename(manifest)
    store.segment().unlink()
    with pytest.raises(StorageDamaged, match="missing"):
        Store(tmp_path).open()


def test_a_manifest_that_is_none_is_damage(tmp_path):
    store = Store(tmp_path).open()
    store.close()
    for content in (
        b"",
        b"{",
        b"[]",
        b'{"format":1}',
        b'{"format":1,"generation":1,"segments":[]}',
    ):
        (store.journal.directory / "manifest.json").write_bytes(content)
        with pytest.raises(StorageDamaged):
            Store(tmp_path).open()


def test_f50_a_newer_store_is_refused_before_anything_is_written(tmp_path):
    store = Store(tmp_path).open()
    store.put(1)
    store.close()
    path = store.journal.directory / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 3'))
    before = {p.name: p.read_bytes() for p in store.journal.directory.iterdir()}
    with pytest.raises(SchemaTooNew) as caught:
        Store(tmp_path).open()
    assert (caught.value.found, caught.value.supported) == (3, 2)
    assert {p.name: p.read_bytes() for p in store.journal.directory.iterdir()} == before


# --- failing disks ----------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_f28_a_full_disk_refuses_and_leaves_nothing_half_written(stores, code):
    store, other = stores(), stores()
    store.put(1)
    before = store.segment().read_bytes()
    store.calls.arm("write", code)
    for _ in range(2):
        with pytest.raises(StorageFull):
            store.put(2)
        assert store.segment().read_bytes() == before
        assert other.get() == [1]
    store.calls.fail.clear()
    store.put(3)
    assert store.get() == other.get() == stores().get() == [1, 3]


def test_f29_a_failed_flush_is_cut_off_for_everybody(stores):
    store, other = stores(), stores()
    store.put(1)
    store.put(2, durable=False)
    assert other.get() == [1, 2]
    store.calls.arm("flush", errno.EIO, times=1)
    with pytest.raises(StorageError, match="errno=5"):
        store.put(3)
    # What was not flushed before is not believed either: the disk may have lost it.
    assert other.get() == store.get() == [1]
    store.put(4)
    assert other.get() == store.get() == stores().get() == [1, 4]


def test_f29_a_flush_that_fails_for_good_poisons_the_store_for_everybody(stores, tmp_path):
    store, other = stores(), stores()
    store.put(1)
    store.calls.arm("flush", errno.EIO)
    with pytest.raises(StorageError, match="poisoned"):
        store.put(2)
    store.calls.fail.clear()
    for each in (store, other):
        for _ in range(2):
            with pytest.raises(StorageError, match="poisoned"):
                each.get()
            with pytest.raises(StorageError, match="check the disk"):
                each.put(3)
    with pytest.raises(StorageError, match="poisoned"):
        stores()
    # The mark survives a restart of the machine, where the lock file's marker says nothing.
    lock = store.journal.lock.path
    lock.write_bytes(b"")
    with pytest.raises(StorageError, match="poisoned"):
        stores()
    # The remedy that the message names.
    lock.unlink()
    (store.journal.directory / "poisoned").unlink()
    assert stores().get()[0] == 1


def test_f29_a_cut_that_fails_poisons_too(stores):
    store = stores()
    store.put(1)
    store.calls.arm("write", errno.EIO)
    store.calls.arm("truncate", errno.EIO)
    with pytest.raises(StorageError, match="poisoned"):
        store.put(2)


def test_f29_a_flush_that_fails_before_reading_a_dead_writers_tail_poisons(stores):
    store = stores()
    store.put(1)
    with store.segment().open("ab") as file:
        file.write(_lines.encode(2, 0, b"delta", b'{"i":2}'))
    store.calls.arm("flush", errno.EIO, times=1)
    with pytest.raises(StorageError, match="poisoned"):
        store.get()


def test_f28_no_room_for_a_new_segment_refuses_and_heals(stores):
    store = stores(segment_bytes=100)
    store.put(1)
    store.put(2)
    store.calls.arm("replace", errno.ENOSPC, times=1)
    with pytest.raises(StorageFull):
        store.put(3)
    assert store.get() == [1, 2]
    store.put(4)
    assert stores().get() == [1, 2, 4]


# --- paths ------------------------------------------------------------------------------------


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "taken").write_text("")
    for root in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(ConfigurationError, match="taken"):
            Store(root).open()


def test_a_path_that_cannot_be_made_is_named():
    from pathlib import Path

    with pytest.raises((StorageError, ConfigurationError), match="/proc/none"):
        Store(Path("/proc/none")).open()


def test_a_store_that_was_deleted_while_open_is_not_written_to(stores):
    import shutil

    store = stores()
    store.put(1)
    shutil.rmtree(store.journal.directory)
    with pytest.raises(StorageError):
        store.put(2)
