"""``pyworkflow plugins``: what is installed, and whether it loads."""

from __future__ import annotations

import click

from pyworkflow.cli import _output as output
from pyworkflow.cli._options import settle_settings, shared, wants_json

__all__ = ["command"]


@click.command("plugins", short_help="List plugins, and which do not load.")
@shared
def command() -> int:
    """List plugins by the URL scheme that they serve, and which of them do not load.

    Exit status 3 when one is broken, or two serve one scheme.
    """
    import logging
    from dataclasses import asdict

    from pyworkflow._plugins import list_plugins

    settle_settings()
    # What does not load is a row of the table: no warning besides.
    logging.getLogger("pyworkflow.plugins").addHandler(logging.NullHandler())
    found = list_plugins()
    if wants_json():
        output.print_json({"plugins": [asdict(one) for one in found]})
    else:
        rows = [
            (
                one.name,
                f"{one.distribution} {one.version}".strip() or "(this application)",
                ", ".join(one.kinds),
                one.status,
            )
            for one in found
        ]
        output.print_table(("NAME", "DISTRIBUTION", "PROVIDES", "STATUS"), rows)
        for one in found:
            if one.error:
                output.note(f"{one.name}: {one.error}")
    return 3 if any(one.status in ("broken", "conflict") for one in found) else 0
