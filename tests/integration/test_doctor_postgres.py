"""`tidegate doctor` looks at the primary and at each replica, and never shows a password."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.servers.postgres_cluster import PostgresCluster


def _doctor(directory: Path, **environment: str) -> tuple[int, list[dict[str, object]], str]:
    ended = subprocess.run(
        [sys.executable, "-m", "tidegate", "doctor", "--json"],
        cwd=directory,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return ended.returncode, json.loads(ended.stdout), ended.stdout + ended.stderr


def test_replicas_are_looked_at(postgres_cluster: PostgresCluster, tmp_path: Path) -> None:
    database = postgres_cluster.primary.new_database()
    name = database.rpartition("/")[2]
    subprocess.run(
        [sys.executable, "-m", "tidegate", "db", "upgrade"], env={**os.environ, "TIDEGATE_CATALOG__URL": database}, check=True
    )
    postgres_cluster.wait_caught_up()
    replicas = [url.replace("postgres@", "postgres:secret-word@") for url in postgres_cluster.replica_urls(name)]
    gone = f"postgresql://postgres:secret-word@127.0.0.1:1/{name}"
    _, found, said = _doctor(tmp_path, TIDEGATE_CATALOG__URL=database, TIDEGATE_CATALOG__REPLICAS=",".join([*replicas, gone]))
    looked = [(each["ok"], str(each["finding"])) for each in found if each["what"] == "replica"]
    assert [ok for ok, _ in looked] == [True, True, False], looked
    assert "version 0" in looked[0][1]
    assert "127.0.0.1:1" in looked[2][1]
    assert "does not answer as a replica" in looked[2][1]
    assert "secret-word" not in said
    postgres_cluster.primary.drop_database(name)
