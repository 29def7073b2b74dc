"""The page of hooks says what the hook specs say."""

from __future__ import annotations

from docs.write_hooks import PAGE, page
from pyworkflow.spi import hookspecs


def test_d09_the_page_of_hooks_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m docs.write_hooks"


def test_d09_every_hook_is_on_the_page() -> None:
    text = page()
    hooks = [name for name in vars(hookspecs) if name.startswith("pyworkflow_")]
    assert len(hooks) > 20
    assert [name for name in hooks if f"### `{name}`" not in text] == []
