"""What the page of the tables says can be asked, can be asked."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from pyworkflow.spi import Change, Event, NewRun
from pyworkflow_storage_sql import PostgresStorageBackend
from tests.servers import GivenServer, PostgresServer

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "tables-postgres.md"


def test_every_statement_of_the_page_runs(postgres: PostgresServer | GivenServer) -> None:
    url = postgres.database()

    async def main() -> None:
        async with PostgresStorageBackend(url) as store:
            new = NewRun(workflow="flow", version="1", args="[]")
            event = Event("workflow.started", "I", {})
            await store.commit_one(Change(run_id="run", key="k", create=new, events=[event]))

    asyncio.run(main())
    statements = re.findall(r"```sql\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(statements) == 5
    for statement in statements:
        postgres.sql(statement, url=url)
    assert postgres.sql("SELECT status FROM pyworkflow.run_status", url=url) == "pending"
