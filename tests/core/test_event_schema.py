"""The schema of every event type, as models and as JSON Schema."""

import json

import pytest

from pyworkflow.errors import SerializationError
from pyworkflow.event_schema import DATA_MODELS, schema, validate_event
from pyworkflow.events import EVENT_VERSION, Event, EventType, event_class

AT = "2025-01-02T03:04:05.000006+00:00"
ERROR = {"type": "builtins:ValueError", "message": "no", "traceback": "", "portable": True}
STEP = {"name": "charge", "digest": "d", "attempt": 1}

#: type → (data with all required fields, optional fields)
GOOD = {
    "workflow.started": (
        {
            "workflow": "w",
            "version": "1",
            "args": '{"x": 1}',
            "seed": "0badcafe",
            "attributes": {"a": [1, None]},
            "profile": 1,
        },
        {
            "idempotency_key": "k",
            "parent": {"run_id": "r", "op": "1#1:child"},
            "deadline": AT,
        },
    ),
    "workflow.resumed": ({"worker": "w", "cause": "timer", "replayed": 0}, {}),
    "workflow.suspended": ({"waiting": ["1#1:sleep"]}, {"until": AT}),
    "workflow.completed": ({"result": "null"}, {}),
    "workflow.failed": ({"error": ERROR}, {}),
    "workflow.cancelled": ({"reason": ""}, {}),
    "workflow.deadline": ({"deadline": AT}, {}),
    "workflow.paused": ({"reason": "r"}, {"actor": "a"}),
    "workflow.unpaused": ({"reason": "r"}, {"actor": "a"}),
    "workflow.terminated": ({"reason": "r"}, {"actor": "a"}),
    "workflow.stalled": ({"reason": "r"}, {"error": ERROR}),
    "workflow.unstalled": ({}, {}),
    "step.scheduled": (
        {
            **STEP,
            "args": "[]",
            "policy": {"max_retries": 3, "delay": "fixed"},
            "queue": "default",
            "semantics": "at_most_once",
        },
        {"timeout": 5},
    ),
    "step.started": (
        {"name": "n", "attempt": 2, "worker": "w", "at": AT, "dispatched": False},
        {},
    ),
    "step.retrying": ({"name": "n", "attempt": 1, "error": ERROR, "retry_at": AT}, {}),
    "step.completed": ({**STEP, "result": "[1, 2]"}, {}),
    "step.failed": ({**STEP, "error": ERROR, "kind": "timeout"}, {}),
    "step.cancelled": ({"name": "n"}, {"by": "end"}),
    "sleep.created": ({"until": AT}, {}),
    "sleep.completed": ({"until": AT, "lag": 0.25}, {}),
    "timer.fired": ({"until": AT, "lag": 0}, {}),
    "cancel.requested": ({"reason": "r"}, {}),
    "limit.reached": ({"length": 60, "limit": 60, "reserve": 100}, {}),
    "version.marked": ({"id": "p"}, {}),
    "log.debug": ({"message": "m", "fields": {"a": 1}}, {"logger": "x", "step": "s", "attempt": 2}),
    "log.info": ({"message": "m", "fields": {}}, {"logger": "x", "step": "s", "attempt": 2}),
    "log.warning": ({"message": "m", "fields": {}}, {"logger": "x", "step": "s", "attempt": 2}),
    "log.error": ({"message": "m", "fields": {}}, {"logger": "x", "step": "s", "attempt": 2}),
}


def event(type, data, **kw):
    return Event(type, event_class(EventType(type)).value, data, run_id="r", seq=1, **kw)


def test_every_type_has_a_model_and_an_example_here():
    assert set(DATA_MODELS) == set(EventType)
    assert set(GOOD) == {known.value for known in EventType}
    assert all(
        DATA_MODELS[EventType(t)].__name__ == t.replace(".", " ").title().replace(" ", "")
        for t in GOOD
    )


@pytest.mark.parametrize("type", GOOD)
def test_good_data_passes_with_and_without_optional_and_unknown_fields(type):
    required, optional = GOOD[type]
    validate_event(event(type, required))
    validate_event(event(type, {**required, **optional}))
    validate_event(event(type, {**required, **dict.fromkeys(optional)}))
    validate_event(event(type, {**required, "added_later": {"x": 1}}))


@pytest.mark.parametrize("type", [t for t, (required, _) in GOOD.items() if required])
def test_each_required_field_is_missed_by_name(type):
    required, _ = GOOD[type]
    for name in required:
        data = {key: value for key, value in required.items() if key != name}
        with pytest.raises(SerializationError, match=f"type={type} v=1: {name}: Field required"):
            validate_event(event(type, data))


@pytest.mark.parametrize(
    ("type", "field", "value"),
    [
        ("workflow.started", "seed", "xyz"),
        ("workflow.started", "args", "{"),
        ("workflow.started", "args", "NaN"),
        ("workflow.started", "args", {"x": 1}),
        ("workflow.started", "profile", "1"),
        ("workflow.resumed", "replayed", True),
        ("workflow.deadline", "deadline", "2025-01-02T03:04:05"),
        ("workflow.deadline", "deadline", "2025-01-02T03:04:05Z"),
        ("workflow.deadline", "deadline", "2025-13-02T03:04:05+00:00"),
        ("workflow.failed", "error", {"message": "no type"}),
        ("step.completed", "attempt", 0),
        ("step.failed", "kind", "bad luck"),
        ("step.scheduled", "policy", {"max_retries": -1, "delay": 1}),
        ("sleep.completed", "lag", -1.0),
        ("sleep.completed", "lag", float("inf")),
        ("log.info", "fields", []),
    ],
)
def test_wrong_values_are_named(type, field, value):
    required, _ = GOOD[type]
    with pytest.raises(SerializationError, match=field):
        validate_event(event(type, {**required, field: value}))


def test_integers_of_any_length_are_payloads():
    validate_event(event("workflow.completed", {"result": "9" * 10_000}))


def test_unknown_types_newer_versions_and_wrong_classes_are_refused():
    with pytest.raises(SerializationError, match="type is unknown"):
        validate_event(Event("signal.invented", "I", {}))
    with pytest.raises(SerializationError, match="schema is newer"):
        validate_event(event("workflow.unstalled", {}, v=EVENT_VERSION + 1))
    with pytest.raises(SerializationError, match="class=I expected=C"):
        validate_event(Event("sleep.created", "I", {"until": AT}))


def test_the_json_schema_is_closed_in_itself_and_discriminates_by_type():
    exported = schema()
    text = json.dumps(exported)
    assert json.loads(text) == exported
    by_type = {one["properties"]["type"]["const"]: one for one in exported["oneOf"]}
    assert set(by_type) == {known.value for known in EventType}
    for known in EventType:
        properties = by_type[known.value]["properties"]
        assert properties["class"] == {"const": event_class(known).value}
        name = properties["data"]["$ref"].removeprefix("#/$defs/")
        assert set(GOOD[known.value][0]) == set(exported["$defs"][name].get("required", []))

    def references(node):
        if isinstance(node, dict):
            for key, value in node.items():
                if key == "$ref":
                    yield value
                else:
                    yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    assert {ref.removeprefix("#/$defs/") for ref in references(exported)} <= set(exported["$defs"])
