"""The database is held by another program: requests say so, and work goes on when it is let go."""

import sqlite3
from contextlib import closing

import pytest

from colmeia.testing.daemon import ApiAnswer, Daemon


def test_a_locked_database_is_said_and_survived(daemon: Daemon) -> None:
    with closing(sqlite3.connect(daemon.state / "colmeia.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(ApiAnswer) as caught:
            daemon.post("/v1/vms", {"name": "waits"})
        assert (caught.value.status, caught.value.body["code"]) == (503, "database_unavailable")
        assert daemon.get("/v1/vms")["items"] == [], "readers do not wait for the writer"
        other.execute("ROLLBACK")
    daemon.create_vm("waits")
