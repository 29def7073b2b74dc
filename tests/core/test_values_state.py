"""Values of types with state come back exactly as they were, or are refused by name."""

from __future__ import annotations

import collections
import dataclasses
import io
import logging
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import InitVar, dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum, StrEnum
from functools import cached_property
from ipaddress import IPv4Address
from typing import Any, Generic, NamedTuple, TypeVar
from zoneinfo import ZoneInfo

import pytest
from pydantic import BaseModel, ConfigDict, PrivateAttr, field_validator
from pydantic.dataclasses import dataclass as pydantic_dataclass

from pyworkflow._same import same
from pyworkflow._serialization import (
    NotSerializable,
    adapter_for,
    decode,
    digest_arguments,
    encode,
    encode_arguments,
)

T = TypeVar("T")
inits: list[str] = []


@dataclass
class Scaled:
    value: int
    scale: InitVar[int]
    total: int = field(init=False, default=0)

    def __post_init__(self, scale: int) -> None:
        inits.append("Scaled")
        self.total = self.value * scale
        self.scaled_by = scale


@dataclass
class Defaulted:
    value: int
    scale: InitVar[int] = 2

    def __post_init__(self, scale: int) -> None:
        self.value *= scale


@dataclass
class Noted:
    value: int

    def __post_init__(self) -> None:
        inits.append("Noted")
        self.value += 1
        self.history = [self.value]


@dataclass
class Bare:
    value: int


class Under(Bare):
    """No dataclass itself."""


class Slotted(Bare):
    __slots__ = ("__hidden", "also")

    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.__hidden = value * 2

    def hidden(self) -> int:
        return self.__hidden


@dataclass(frozen=True)
class Frozen:
    value: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "doubled", self.value * 2)


@dataclass(slots=True)
class Tight:
    value: int
    more: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.more.append(self.value)


@dataclass
class Own:
    value: int

    def __init__(self, text: str) -> None:
        self.value = int(text)
        self.text = text


@dataclass
class Counted:
    value: int

    @property
    def size(self) -> int:
        return self._size

    @size.setter
    def size(self, size: int) -> None:
        self._size = size

    @cached_property
    def stamp(self) -> object:
        return object()

    @cached_property
    def drawn(self) -> list[int]:
        return [len(inits), self.value]


@dataclass
class Page(Generic[T]):
    item: T


@dataclass
class Queue(deque):  # type: ignore[type-arg]
    value: int = 0


@pydantic_dataclass
class Checked:
    value: int

    def __post_init__(self) -> None:
        inits.append("Checked")
        self.value += 1
        self.late = self.value


@pydantic_dataclass
class CheckedInit:
    value: int
    scale: InitVar[int]

    def __post_init__(self, scale: int) -> None:
        self.value *= scale


@pydantic_dataclass(config=ConfigDict(extra="allow"))
class Open:
    value: int


class Point(NamedTuple):
    x: int
    y: int = 0


class Extra(Point):
    """A named tuple with attributes."""


class Colour(Enum):
    RED = "r", 1
    BLUE = "b", 2

    def __init__(self, code: str, number: int) -> None:
        self.code = code
        self.number = number


class Loose(StrEnum):
    KNOWN = "known"

    @classmethod
    def _missing_(cls, value: object) -> Loose:
        made = str.__new__(cls, value)
        made._name_ = made._value_ = str(value)
        return made


class Cached(BaseModel):
    value: int

    @cached_property
    def drawn(self) -> list[int]:
        return [self.value, len(inits)]

    @cached_property
    def client(self) -> object:
        return threading.Lock()


class Memo:
    """A class that is no plain data."""

    def __init__(self, n: int) -> None:
        self.n = n


class Private(BaseModel):
    value: int
    _lock: Any = PrivateAttr(default_factory=threading.Lock)
    _log: Any = PrivateAttr(default_factory=lambda: logging.getLogger("x"))
    _memo: Any = PrivateAttr(default_factory=lambda: Memo(0))


class Built(BaseModel):
    value: int
    _memo: Any = PrivateAttr()

    def model_post_init(self, _context: object) -> None:
        self._memo = Memo(self.value)


class Foreign(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    address: IPv4Address
    when: datetime

    @cached_property
    def drawn(self) -> int:
        return len(inits)


class Adding(BaseModel):
    value: int

    @field_validator("value")
    @classmethod
    def _more(cls, value: int) -> int:
        return value + 1


def late(value: Any, /, **attributes: Any) -> Any:
    for name, item in attributes.items():
        object.__setattr__(value, name, item)
    return value


def slotted() -> Slotted:
    value = Slotted(3)
    value.also = [1]  # type: ignore[attr-defined]
    return value


def counted() -> Counted:
    value = Counted(1)
    value.size = 7
    assert value.drawn
    assert value.stamp
    return value


EXACT: list[Any] = [
    Scaled(2, 3),
    Defaulted(2, 5),
    Defaulted(3),
    Noted(1),
    late(Noted(1), value="x", other=(1, 2)),
    late(Bare(1), other={1: b"x"}, **{"$py": "no tag"}),
    Under(1),
    late(Under(1), other=1),
    slotted(),
    Frozen(1),
    Tight(4),
    Own("12"),
    Page[int](1),
    late(Page(Noted(1)), other=Decimal("1.10")),
    Checked(1),
    late(Checked(1), later=2),
    CheckedInit(2, 3),
    Open(1, other="kept"),  # type: ignore[call-arg]
    Point(1),
    Extra(1, 2),
    late(Extra(1, 2), note="n"),
    Colour.RED,
    [Colour.BLUE, {"a": Noted(2)}],
    Cached(value=1),
    Private(value=1),
    Built(value=3),
    Foreign(address=IPv4Address("10.0.0.1"), when=datetime(2026, 1, 1, tzinfo=UTC)),
]


@pytest.mark.parametrize("value", EXACT, ids=lambda value: type(value).__name__)
def test_v01_state_comes_back_exactly_and_runs_no_code_of_the_class(value: Any) -> None:
    inits.clear()
    again = decode(encode(value))
    assert type(again) is type(value)
    assert same(value, again)
    assert (
        getattr(value, "__dict__", {}).keys() - {"__orig_class__"}
        == getattr(again, "__dict__", {}).keys()
    )
    assert not inits
    assert encode(again) == encode(value)


def test_v01_slots_that_are_hidden_come_back() -> None:
    again = decode(encode(slotted()))
    assert (again.value, again.hidden(), again.also) == (3, 6, [1])


def test_v01_what_a_cached_property_kept_comes_back_where_it_can() -> None:
    value = counted()
    inits.append("later")
    again = decode(encode(value))
    assert (again.drawn, again.size) == (value.drawn, 7)
    assert "stamp" not in vars(again)  # it has no form in JSON, and is computed again
    model = Cached(value=1)
    assert model.drawn
    assert model.client
    inits.append("later")
    assert decode(encode(model)).drawn == model.drawn


def loud(value: Any) -> Any:
    value.address = object()
    return value


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (late(Noted(1), guard=threading.Lock()), r"result\.guard .*type=_thread\.lock"),
        (late(Bare(1), memo=Memo(1)), r"result\.memo .*Memo"),
        (late(Extra(1), memo=Memo(1)), r"result\.memo .*Memo"),
        ({"a": [late(Checked(1), memo=Memo(1))]}, r"result\['a'\]\[0\]\.memo .*Memo"),
        (late(Under(1), inner=late(Under(2), memo=Memo(1))), r"result\.inner\.memo .*Memo"),
        (Queue(1), "Queue"),
        (Loose("unknown"), "Loose: its class has no member"),
        (late(Private(value=1), _memo=Memo(5)), r"result\._memo .*Memo"),
        (Adding(value=1), "changed when it is validated"),
        (Memo(1), "Memo"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_v01_what_cannot_come_back_is_refused_by_name(value: Any, path: str) -> None:
    with pytest.raises(NotSerializable, match=path):
        encode(value)


class Numbers(list[int]):
    """A list that may have attributes."""


class Real(float):
    """A float that adds nothing, as NumPy's."""


@pytest.mark.parametrize(
    ("annotation", "value", "comes_back"),
    [
        (list[int], Numbers([1]), [1]),
        (list[int], late(Numbers([1]), note="n"), None),
        (float, Real(1.5), 1.5),
        (float, late(Real(1.5), note="n"), None),
        (dict[str, int], Counter("aab"), {"a": 2, "b": 1}),
        (dict[str, int], OrderedDict(a=1), {"a": 1}),
        (dict[str, list[int]], defaultdict(list, a=[1]), None),
        (dict[str, int], defaultdict(None, a=1), {"a": 1}),
        (defaultdict[str, list[int]], defaultdict(list, a=[1]), defaultdict(list, a=[1])),
        (deque[int], deque([1, 2]), deque([1, 2])),
        (tuple[int, int], Extra(1, 2), Extra(1, 2)),
        (list[IPv4Address], [IPv4Address("10.0.0.1")], [IPv4Address("10.0.0.1")]),
        (
            tuple[IPv4Address, datetime],
            (IPv4Address("10.0.0.1"), datetime(2026, 1, 1, tzinfo=ZoneInfo("Europe/Paris"))),
            None,
        ),
        (tuple[IPv4Address, Decimal], (IPv4Address("10.0.0.1"), Decimal("1.10")), "itself"),
        (tuple[IPv4Address, Noted], (IPv4Address("10.0.0.1"), Noted(1)), None),
    ],
    ids=str,
)
def test_v01_an_annotation_does_not_hide_that_state_was_lost(
    annotation: Any, value: Any, comes_back: Any
) -> None:
    adapter = adapter_for(annotation)
    if comes_back is None:
        with pytest.raises(NotSerializable, match="cannot be stored"):
            encode(value, adapter)
        return
    wanted = value if comes_back == "itself" else comes_back
    again = decode(encode(value, adapter), adapter)
    assert again == wanted
    assert type(again) is type(wanted)
    assert str(again) == str(wanted)


def test_v01_what_0_1_0_stored_of_such_values_loads() -> None:
    def tag(kind: type, fields: str, tag: str = "dataclass") -> str:
        name = f"{kind.__module__}:{kind.__qualname__}"
        return f'{{"$py":"{tag}","t":"{name}","v":{{{fields}}}}}'

    noted = decode(tag(Noted, '"value":2'))
    assert (noted.value, noted.history) == (2, [3])  # as it was read then: by its constructor
    assert decode(tag(Scaled, '"value":2,"total":6')).total == 6
    assert decode(tag(Checked, '"value":2', "pydantic_dataclass")).late == 3
    assert decode(tag(Extra, '"x":1,"y":2', "namedtuple")) == Extra(1, 2)


def test_v01_state_besides_the_fields_is_no_other_argument() -> None:
    drawn, fresh = Cached(value=1), Cached(value=1)
    assert drawn.drawn
    pairs: list[tuple[Any, Any]] = [(drawn, fresh), (late(Bare(1), other=1), Bare(1))]
    for one, other in pairs:
        digests = {digest_arguments(encode_arguments((v,), {})) for v in (one, other)}
        assert len(digests) == 1
    old = '{"args":[{"$py":"dataclass","t":"%s:Noted","v":{"value":2}}]}' % __name__  # noqa: UP031 - braces
    assert digest_arguments(old) == digest_arguments(encode_arguments((Noted(1),), {}))


def test_v01_a_field_that_is_new_gets_its_default_and_a_lost_one_stalls() -> None:
    text = encode(Tight(4))
    assert decode(text.replace(',"more":[4]', "")).more == []
    with pytest.raises(Exception, match="no field 'other' any more"):
        decode(text.replace('"more"', '"other"'))


def test_v01_same_tells_what_differs() -> None:
    assert same(Memo(1), Memo(1))
    assert not same(Memo(1), Memo(2))
    assert not same(io.StringIO("a"), io.StringIO("b"))
    assert same(threading.Lock(), threading.Lock())
    assert not same([1], [True])
    assert not same({"a": 1.0}, {"a": 1})
    assert same({1, "a"}, {"a", 1})
    assert not same(collections.OrderedDict(a=1, b=2), collections.OrderedDict(b=2, a=1))
    loop: list[Any] = []
    loop.append(loop)
    other: list[Any] = []
    other.append(other)
    assert same(loop, other)
    assert dataclasses.is_dataclass(Bare)
