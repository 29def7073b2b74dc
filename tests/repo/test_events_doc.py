"""The page of events says what the schema says."""

from __future__ import annotations

from docs.write_events import PAGE, page


def test_the_page_of_events_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m docs.write_events"
