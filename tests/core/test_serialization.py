"""Payloads come back with equal value and equal type, or are refused with the way out."""

import dataclasses
import enum
import importlib
import json
import subprocess
import sys
import uuid
from collections import OrderedDict, namedtuple
from dataclasses import InitVar, dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from ipaddress import IPv4Address
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Generic, NamedTuple, TypeVar
from zoneinfo import ZoneInfo

import pydantic
import pydantic.dataclasses
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    RootModel,
    SecretStr,
    field_validator,
)

from pyworkflow import _tagged
from pyworkflow._portable import portable_name, register_portable, resolve_type
from pyworkflow._serialization import (
    NotSerializable,
    StoredValueInvalid,
    adapter_for,
    canonical,
    decode,
    decode_arguments,
    digest,
    digest_arguments,
    encode,
    encode_arguments,
)
from pyworkflow.errors import SerializationError

T = TypeVar("T")


class Colour(enum.Enum):
    RED = 1
    ROUGE = 1  # noqa: PIE796 # an alias
    BLUE = "b"


class Level(enum.IntEnum):
    LOW = 1


class Word(enum.StrEnum):
    YES = "yes"


class Access(enum.Flag):
    READ = 1
    WRITE = 2


class Point(NamedTuple):
    x: int
    y: Any = 0


Old = namedtuple("Old", "a b")  # noqa: PYI024 # the older way to write it


@dataclass
class Item:
    name: str
    count: Any = 1


@dataclass(frozen=True, slots=True)
class Frozen:
    key: Any
    rest: tuple[int, ...] = ()


@dataclass(kw_only=True)
class Derived(Item):
    made: list[int] = field(default_factory=list, init=False)
    extra: str = "e"

    def __post_init__(self):
        self.name = self.name + "!"
        self.made.append(1)


@dataclass
class Wanting:
    value: int
    scale: InitVar[int]

    def __post_init__(self, scale):
        self.value *= scale


@dataclass
class Box(Generic[T]):
    item: T


class Model(BaseModel):
    x: int
    any: Any = None
    child: "Model | None" = None


class Aliased(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)
    inner_name: int = Field(alias="innerName")
    _secret: int = PrivateAttr(default=0)
    _lock: Any = PrivateAttr(default_factory=object)


class Holder(BaseModel):
    model: Model


class Bigger(Model):
    more: str = "m"


class Listing(RootModel[list[int]]):
    pass


class Page(BaseModel, Generic[T]):
    items: list[T]


class Web(BaseModel):
    address: IPv4Address
    url: pydantic.HttpUrl


class Secretive(BaseModel):
    password: SecretStr
    address: IPv4Address


class Doubling(BaseModel):
    n: int

    @field_validator("n")
    @classmethod
    def double(cls, value):
        return value * 2


class Picky(BaseModel):
    n: int

    @field_validator("n", mode="before")
    @classmethod
    def only_text(cls, value):
        if not isinstance(value, str):
            raise ValueError("text only")
        return int(value)


@pydantic.dataclasses.dataclass
class Checked:
    x: int
    y: Decimal = Decimal(0)
    z: int = field(default=5, init=False)


class Plain:
    pass


class Text(str):
    __slots__ = ()


def same(left, right):
    """Equal in value and in type, all the way down."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return len(left) == len(right) and all(
            same(a, b) and same(left[a], right[b]) for a, b in zip(left, right, strict=True)
        )
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, (set, frozenset)):
        return left == right and all(any(same(a, b) for b in right) for a in left)
    if dataclasses.is_dataclass(left):
        names = [f.name for f in dataclasses.fields(left)]
        return all(same(getattr(left, n), getattr(right, n)) for n in names)
    if isinstance(left, BaseModel):
        return same(left.__dict__, right.__dict__) and left == right
    return left == right and (isinstance(left, int) or repr(left) == repr(right))


def round_trip(value, adapter=None):
    text = encode(value, adapter)
    json.loads(text, parse_constant=pytest.fail)
    return decode(text, adapter)


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(2**3000), max_value=2**3000)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.sampled_from(["$py", "v", "dict", "t", "", "\0", "\u2028", "😀"])
)
zones = st.none() | st.sampled_from(
    [
        UTC,
        timezone(timedelta(hours=5, minutes=30)),
        timezone(timedelta(seconds=-61, microseconds=7)),
        timezone(timedelta(hours=1), "CET é"),
        timezone(timedelta(0), "GMT"),
        ZoneInfo("Europe/Paris"),
        ZoneInfo("UTC"),
    ]
)
hashable = (
    scalars
    | st.datetimes(timezones=zones, allow_imaginary=False)
    | st.dates()
    | st.builds(lambda t, z, f: t.replace(tzinfo=z, fold=f), st.times(), zones, st.integers(0, 1))
    | st.timedeltas()
    | st.uuids()
    | st.decimals(allow_nan=False, allow_infinity=False)
    | st.complex_numbers(allow_nan=False, allow_infinity=False)
    | st.binary()
    | st.sampled_from([*Colour, *Level, *Word, Access.READ | Access.WRITE, Access(0)])
    | st.sampled_from([Path("/a/b"), PurePosixPath("é"), PureWindowsPath("c:/x"), range(1, 9, 3)])
)
hashable_trees = st.recursive(
    hashable,
    lambda inner: (
        st.lists(inner, max_size=3).map(tuple)
        | st.frozensets(inner, max_size=3)
        | st.builds(Point, st.integers(), inner)
        | st.builds(Frozen, inner)
    ),
    max_leaves=6,
)
values = st.recursive(
    hashable_trees | st.binary().map(bytearray),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=3) | st.just("$py"), inner, max_size=4)
        | st.dictionaries(hashable_trees, inner, max_size=3)
        | st.sets(hashable_trees, max_size=3)
        | st.builds(Item, st.text(max_size=3), inner)
        | st.builds(Box, inner)
        | st.builds(Model, x=st.integers(), any=inner)
        | st.builds(Old, inner, inner)
    ),
    max_leaves=10,
)


@settings(max_examples=300, deadline=None)
@given(values)
def test_m05_any_value_comes_back_equal_in_value_and_type(value):
    assert same(round_trip(value), value)


@settings(max_examples=150, deadline=None)
@given(values)
def test_encoding_what_was_decoded_gives_the_same_text(value):
    text = encode(value)
    assert encode(decode(text)) == text


@settings(max_examples=150, deadline=None)
@given(st.recursive(scalars, lambda v: st.lists(v) | st.dictionaries(st.text(), v), max_leaves=10))
def test_plain_json_is_written_as_plain_json(value):
    text = encode(value)
    if _tagged.MARKED not in text:
        assert same(json.loads(text), value)


@pytest.mark.parametrize(
    "value",
    [
        {"$py": "datetime", "v": "2020-01-01"},
        {"$py": 1},
        {"$py": {"$py": {"$py": None}}},
        [{"$py": "typed", "v": 1}],
        {"$py": "typed", "v": 1},
        {"a": "$py", "$": '"$py"'},
        '{"$py":"tuple","v":[]}',
        ["$py", "tuple", []],
        {1: {"$py": ()}},
    ],
)
def test_user_data_never_collides_with_tags(value):
    assert same(round_trip(value), value)


@pytest.mark.parametrize(
    "value",
    [
        -0.0, 1e308, 5e-324, 1e16, 0.1 + 0.2, 2**63, -(2**63), 2**70, -(2**70), 10**5000, -(10**5000),
        "\x00", "😀", "\u2028\ufeff\x7f", complex(-0.0, 1e308), Decimal("-0.00"), Decimal("1E+500"),
        (), [], {}, set(), frozenset(), b"", bytearray(b"\xff"), ((),), {(): ()}, {1: "a", "1": "b"},
        {None: 1, True: 2, 2.5: 3}, {Colour.RED: 1, Word.YES: 2}, {(1, "a"): {frozenset([1]): 2}},
        Colour.ROUGE, Level.LOW, Word.YES, datetime.max,  # noqa: DTZ901
        datetime.min.replace(tzinfo=UTC),
        datetime(2024, 10, 27, 2, 30, tzinfo=ZoneInfo("Europe/Paris"), fold=1),
        datetime(2024, 10, 27, 2, 30, fold=1), date.max,  # noqa: DTZ001
        time.max, timedelta.min, timedelta.max,
        uuid.UUID(int=0), range(10**20, 0, -1), range(2**3000), Path(), Path("/x") / "é",
        Point(1, (2,)), Old(1, [2]), Item("a", {1}), Frozen((1,), (2,)), Box(Box(1)),
        Model(x=1, any=(datetime(2020, 1, 1, tzinfo=UTC), {1: {2}}), child=Bigger(x=2)),
        Holder(model=Bigger(x=1, more="kept")), Listing([1, 2]), Page[int](items=[1]),
        Page[Model](items=[Model(x=1)]), Page[Page[int]](items=[Page[int](items=[])]),
        Web(address="10.0.0.1", url="https://example.org/"), Checked(1, Decimal("1.50")),
        {"deep": [Web(address="10.0.0.1", url="https://example.org/")]},
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_m05_known_values_come_back(value):
    assert same(round_trip(value), value)


def test_the_zone_of_a_datetime_is_kept_not_only_its_offset():
    instant = datetime(2024, 7, 1, tzinfo=ZoneInfo("Europe/Paris"))
    assert round_trip(instant).tzinfo is ZoneInfo("Europe/Paris")
    assert round_trip(instant).utcoffset() == timedelta(hours=2)
    assert round_trip(instant.replace(tzinfo=timezone(timedelta(hours=1), "X"))).tzname() == "X"


def test_datetimes_that_pydantic_parsed_come_back_equal():
    parsed = adapter_for(datetime).validate_json('"2024-01-01T00:00:00+02:00"')
    assert round_trip(parsed) == parsed
    assert type(round_trip(parsed).tzinfo) is timezone


# Dataclasses and models.


def test_post_init_does_not_change_a_stored_dataclass_again():
    value = Derived("a", count=(1,))
    value.made.append(2)
    again = round_trip(value)
    assert (again.name, again.count, again.made, again.extra) == ("a!", (1,), [1, 2], "e")


def test_a_dataclass_with_an_init_only_parameter_comes_back():
    assert round_trip(Wanting(2, 3)) == Wanting(6, 1)


def test_a_field_that_has_a_default_may_be_new_and_one_without_may_not(monkeypatch):
    text = encode(Item("a", 2))
    assert decode(text.replace(',"count":2', "")) == Item("a", 1)
    with pytest.raises(StoredValueInvalid, match=r"type=.*:Item: .*'name'"):
        decode(text.replace('"name":"a",', ""))
    with pytest.raises(StoredValueInvalid, match="no field 'colour' any more"):
        decode(text.replace('"name"', '"colour"'))


def test_a_model_keeps_aliases_extras_private_attributes_and_the_set_of_given_fields():
    value = Aliased(innerName=3, also=(1,))
    value._secret = 7
    again = round_trip(value)
    assert (again.inner_name, again.also, again._secret) == (3, (1,), 7)
    assert round_trip(Model(x=1)).model_fields_set == {"x"}
    assert round_trip(Model(x=1, any=None, child=None)).model_fields_set == {"x", "any", "child"}


def test_m05_a_stored_model_that_no_longer_validates_is_an_error_of_its_own():
    text = encode(Model(x=1)).replace('"x":1', '"x":"one"')
    with pytest.raises(StoredValueInvalid, match=r":Model: ValidationError") as caught:
        decode(text)
    assert caught.value.type.endswith(":Model")
    assert isinstance(caught.value, SerializationError)


@pytest.mark.parametrize("value", [Doubling(n=1), Picky(n="1")])
def test_a_model_that_validation_changes_or_refuses_is_refused_before_it_is_stored(value):
    with pytest.raises(NotSerializable, match="validat"):
        encode([value])


def test_secrets_are_neither_stored_masked_nor_in_the_open():
    with pytest.raises(NotSerializable, match=r"result\['s'\]\.password"):
        encode({"s": Secretive(password="p", address="10.0.0.1")})


# Refusals.


def cycle():
    value: dict[str, Any] = {}
    value["self"] = [value]
    return value


def nested(levels):
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "path", "words"),
    [
        ({"a": [1, 2, {"b": float("nan")}]}, "result['a'][2]['b']", "not a finite number"),
        (float("inf"), "result", "not a finite number"),
        ({"a": complex(0, float("inf"))}, "result['a']", "not a finite number"),
        ([Decimal("NaN")], "result[0]", "not a finite number"),
        (["a", "\ud800"], "result[1]", "lone surrogate"),
        ({"\udfff": 1}, "result['\\udfff']", "lone surrogate"),
        (Item("a", [Plain()]), "result.count[0]", "type=.*Plain"),
        (Point(1, {2: Plain()}), "result.y[2]", "type=.*Plain"),
        ({1: {Plain: 1}}, "result[1]", "type=type"),
        ({Plain()}, "result{…}", "type=.*Plain"),
        (Text("a"), "result", "type=.*Text"),
        (OrderedDict(a=1), "result", "type=collections.OrderedDict"),
        (lambda: 1, "result", "type=function"),
        (object(), "result", "plain data, a dataclass or a pydantic model"),
        (iter([]), "result", "type=list_iterator"),
        (ValueError("x"), "result", "type=ValueError"),
        (memoryview(b""), "result", "type=memoryview"),
        (nested(191), "result[0][0]", "nested more than 190"),
        (cycle(), "result['self'][0]['self']", "contains itself"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else "",
)
def test_what_cannot_be_stored_is_refused_by_path_and_type(value, path, words):
    with pytest.raises(SerializationError, match=words) as caught:
        encode(value)
    assert isinstance(caught.value, TypeError)
    assert str(caught.value).startswith(path)
    assert str(caught.value).partition(" cannot be stored: type=")[1]


@pytest.mark.parametrize("make", [list, dict])
def test_a_value_that_contains_itself_is_called_so_and_not_large(make):
    value = make()
    value.append(value) if make is list else value.update(me=value)
    with pytest.raises(SerializationError, match="it contains itself"):
        encode(value, limit=100_000)


def test_the_deepest_allowed_value_comes_back():
    assert round_trip(nested(190)) == nested(190)
    value: Any = 1
    for _ in range(95):
        value = (value,)
    assert same(round_trip(value), value)


def test_a_class_of_a_function_is_refused_with_the_remedy():
    @dataclass
    class Local:
        x: int

    with pytest.raises(NotSerializable, match="top level of a module"):
        encode(Local(1))


def test_a_zone_without_a_name_is_refused():
    class Strange(timezone.__base__):
        def utcoffset(self, when):
            return timedelta()

    with pytest.raises(NotSerializable, match="timezone of the standard library"):
        encode(datetime(2020, 1, 1, tzinfo=Strange()))


def test_a_dataclass_of_a_builtin_container_is_refused():
    with pytest.raises(NotSerializable, match="no exact form"):
        encode(ListLike(1))


@dataclass
class ListLike(list):
    x: int


# Annotations.


def test_an_annotation_carries_what_has_no_exact_form():
    adapter = adapter_for(dict[str, IPv4Address])
    value = {"$py": IPv4Address("10.0.0.1")}
    with pytest.raises(NotSerializable):
        encode(value)
    assert round_trip(value, adapter) == value
    with pytest.raises(StoredValueInvalid, match="annotation"):
        decode(encode(value, adapter))
    with pytest.raises(StoredValueInvalid, match="validation error"):
        decode(encode(value, adapter), adapter_for(dict[str, int]))


def test_an_annotation_changes_nothing_where_values_speak_for_themselves():
    assert same(round_trip((1, 2), adapter_for(list[float])), (1, 2))


def test_bytes_beside_a_foreign_type_survive_the_annotation():
    value = (b"\xff\x00", IPv4Address("10.0.0.1"))
    assert round_trip(value, adapter_for(tuple[bytes, IPv4Address])) == value


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (list[float | IPv4Address], [float("nan"), IPv4Address("10.0.0.1")]),
        (list[float | IPv4Address], [IPv4Address("10.0.0.1"), float("inf")]),
        (list[SecretStr], [SecretStr("p")]),
        (list[int], [Plain()]),
        (IPv4Address, Plain()),
    ],
)
def test_what_the_annotation_would_alter_is_refused(annotation, value):
    with pytest.raises(NotSerializable, match="cannot be stored"):
        encode(value, adapter_for(annotation))


def test_adapters_are_built_once_and_only_where_the_annotation_says_something():
    import inspect

    assert adapter_for(list[int]) is adapter_for(list[int])
    for nothing in (Any, object, inspect.Parameter.empty, "int", Plain):
        assert adapter_for(nothing) is None
    assert adapter_for(Annotated[int, []]) is not None
    assert adapter_for(Model) is not None


# Digests.


def test_h26_sets_and_dicts_have_one_canonical_text():
    left = {"b": {"x", "y", "z"}, "a": {1: 2, 3: {"q": 1, "p": 2}}}
    right = {"a": {3: {"p": 2, "q": 1}, 1: 2}, "b": {"z", "x", "y"}}
    assert canonical(left) == canonical(right)
    assert encode(left) != encode(right)
    assert canonical([1, 2]) != canonical([2, 1])
    assert canonical((1,)) != canonical([1])
    inner = frozenset({Frozen("k")})
    assert canonical({inner}) == canonical({frozenset({Frozen("k")})})


def test_h26_digests_do_not_depend_on_the_hash_seed():
    code = (
        "from pyworkflow._serialization import digest_arguments, encode_arguments as e;"
        "print(digest_arguments(e(({'alice', 'bob', 'carol', ('d', 'e')},), {'k': {'x', 'y'}})))"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": str(seed), "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in range(3)
    }
    assert len(digests) == 1
    assert len(digests.pop().strip()) == 16


def test_digests_tell_arguments_apart_and_stay_the_same_for_ever():
    texts = [
        encode_arguments(args, kwargs)
        for args, kwargs in [((), {}), ((1,), {}), ((), {"a": 1}), (("1",), {}), ((1.0,), {})]
    ]
    assert len({digest_arguments(text) for text in texts}) == 5
    assert digest("[]") == "71857576257465c7"
    swapped = encode_arguments((), {"b": 2, "a": 1})
    assert digest_arguments(swapped) == digest_arguments(encode_arguments((), {"a": 1, "b": 2}))


# Arguments.


@settings(max_examples=100, deadline=None)
@given(st.lists(values, max_size=3), st.dictionaries(st.text(max_size=3), values, max_size=3))
def test_arguments_come_back(args, kwargs):
    again = decode_arguments(encode_arguments(tuple(args), kwargs))
    assert same(again, (tuple(args), kwargs))
    assert decode_arguments(encode_arguments((), {"$py": "tuple", "v": []})) == (
        (),
        {"$py": "tuple", "v": []},
    )


def test_arguments_that_cannot_be_stored_are_named():
    with pytest.raises(NotSerializable, match=r"^args\[1\]\['a'\]"):
        encode_arguments((1, {"a": Plain()}), {})
    with pytest.raises(NotSerializable, match=r"^argument 'user'"):
        encode_arguments((), {"user": Plain()})


def test_arguments_use_the_adapter_of_their_position_or_name():
    adapters = {0: adapter_for(IPv4Address), "b": adapter_for(IPv4Address)}
    host = IPv4Address("10.0.0.1")
    text = encode_arguments((host,), {"b": host}, adapters)
    assert decode_arguments(text, adapters) == ((host,), {"b": host})


# Names of types, and what damaged or foreign text does.


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[1", '{"a":1}x', "\x00",
        '{"$py":"next"}', '{"$py":[]}', '{"$py":null}',
        '{"$py":"tuple"}', '{"$py":"tuple","v":5}', '{"$py":"datetime","v":"yesterday"}',
        '{"$py":"bytes","v":"%"}', '{"$py":"int","v":"z"}', '{"$py":"range","v":[]}',
        '{"$py":"set","v":[[]]}', '{"$py":"datetime","v":"2020-01-01","z":"No/Where"}',
        '{"$py":"enum","t":"os:system","v":"ls"}', '{"$py":"enum","t":"subprocess:Popen","v":"ls"}',
        '{"$py":"flag","t":"subprocess:Popen","v":["ls"]}', '{"$py":"enum","t":5,"v":"ls"}',
        '{"$py":"dataclass","t":"subprocess:Popen","v":{"args":["ls"]}}',
        '{"$py":"namedtuple","t":"builtins:tuple","v":{}}',
        '{"$py":"model","t":"builtins:dict","v":{}}', '{"$py":"model","t":"builtins:list[builtins:int]","v":{}}',
        '{"$py":"pydantic_dataclass","t":"builtins:int","v":{}}',
        '{"$py":"enum","t":"no_colon","v":"A"}', '{"$py":"enum","t":"http:HTTPStatus","v":"NOPE"}',
        '{"$py":"enum","t":"never_imported_anywhere:Thing","v":"A"}',
        '{"$py":"enum","t":"http:HTTPStatus[","v":"OK"}',
    ],
)  # fmt: skip
def test_text_that_cannot_be_read_is_one_kind_of_error(text):
    with pytest.raises(SerializationError):
        decode(text)


def test_found_m07_a_type_is_found_where_its_module_is_imported_and_nowhere_else(
    tmp_path, monkeypatch
):
    (tmp_path / "shop_under_test").mkdir()
    (tmp_path / "shop_under_test" / "__init__.py").touch()
    (tmp_path / "shop_under_test" / "kinds.py").write_text(
        "import enum\nclass Kind(enum.Enum):\n    A = 1\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    name = "shop_under_test.kinds:Kind"
    register_portable("shop_under_test.workflows")
    with pytest.raises(SerializationError, match="import it in the module"):
        resolve_type(name)
    assert "shop_under_test" not in sys.modules
    importlib.import_module("shop_under_test.kinds")
    assert resolve_type(name).__name__ == "Kind"
    for module in ("this", "turtle", "smtpd"):
        with pytest.raises(SerializationError):
            resolve_type(f"{module}:s")
        assert module not in sys.modules


def test_names_of_nested_and_generic_types():
    class_name = portable_name(Page[int])
    assert class_name == f"{__name__}:Page[builtins:int]"
    assert resolve_type(class_name) is Page[int]
    with pytest.raises(NotSerializable, match="would not find this class"):
        encode(Page[list[int]](items=[]))


SCRIPT = """
import enum, sys
from dataclasses import dataclass
from pyworkflow._serialization import decode, encode

class Colour(enum.Enum):
    RED = 1

@dataclass
class Order:
    colour: Colour

if __name__ == "__main__":
    text = encode(Order(Colour.RED))
    assert decode(text) == Order(Colour.RED) and type(decode(text)) is Order
    assert "shop_script" not in sys.modules
    print(text)
"""


def test_types_of_a_script_are_named_by_its_file_and_read_by_a_worker_that_imports_it(tmp_path):
    script = tmp_path / "shop_script.py"
    script.write_text(SCRIPT)
    path = ":".join([str(tmp_path), *sys.path])
    text = subprocess.run(
        [sys.executable, str(script)],
        env={"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert '"shop_script:Order"' in text
    worker = (
        "import sys, shop_script; from pyworkflow._serialization import decode;"
        "assert type(decode(sys.argv[1])) is shop_script.Order"
    )
    subprocess.run([sys.executable, "-c", worker, text], env={"PYTHONPATH": path}, check=True)
    module = [sys.executable, "-m", "shop_script"]
    assert subprocess.check_output(module, env={"PYTHONPATH": path}, text=True) == text
