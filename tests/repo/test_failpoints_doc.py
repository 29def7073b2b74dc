"""The page of failpoints says what the modules register."""

from __future__ import annotations

from docs.write_failpoints import PAGE, page


def test_the_page_of_failpoints_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m docs.write_failpoints"
