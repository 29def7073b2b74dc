"""The page of the contracts says what the docstrings say."""

from __future__ import annotations

import importlib

import pytest

from docs.write_spi import MODULES, PAGE, page


def test_d08_the_page_of_the_contracts_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m docs.write_spi"


@pytest.mark.parametrize("name", MODULES)
def test_d08_each_public_name_is_on_the_page(name: str) -> None:
    text = page()
    missing = [
        each for each in importlib.import_module(name).__all__ if f"#### `{each}" not in text
    ]
    assert missing == []
