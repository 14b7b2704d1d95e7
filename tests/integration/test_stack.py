"""`make stack`: one runs at a time, a dead one is cleaned up after, nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest
from drills.stack_command import Recorded, State, began_at, clean_up, main, read_state, write_state

from tests.moments import PATIENCE_S, wait_until


@pytest.fixture
def sleeping() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def recorded(process: subprocess.Popen[bytes], later: int = 0) -> Recorded:
    return Recorded("redis 1", "127.0.0.1:1", process.pid, (began_at(process.pid) or 0) + later)


def test_what_a_dead_keeper_left_is_ended(sleeping: subprocess.Popen[bytes], tmp_path: Path) -> None:
    directory = tmp_path / "tidegate-stack-1"
    directory.mkdir()
    path = tmp_path / "state.json"
    state = State(Recorded("keeper", "", 0, 0), str(directory), pieces=(recorded(sleeping),))
    write_state(path, state)
    assert read_state(path) == state
    assert clean_up(path, state) == [f"redis 1 {sleeping.pid}"]
    assert sleeping.wait(PATIENCE_S) == -signal.SIGKILL
    assert not directory.exists()
    assert not path.exists()


def test_what_was_not_recorded_yet_is_found_by_its_place_for_files(tmp_path: Path) -> None:
    directory = tmp_path / "tidegate-stack-2"
    directory.mkdir()
    state = State(Recorded("keeper", "", 0, 0), str(directory))
    with subprocess.Popen(["sleep", "600"], env={"PATH": os.environ["PATH"], "TMPDIR": str(directory)}) as process:
        # Until it has become `sleep`, it has the environment of this test.
        wait_until(lambda: str(directory).encode() in Path(f"/proc/{process.pid}/environ").read_bytes(), 60, "it sleeps")
        assert clean_up(tmp_path / "state.json", state) == [f"unrecorded {process.pid}"]
        assert process.wait(PATIENCE_S) == -signal.SIGKILL


def test_a_process_with_a_reused_id_is_not_ended(sleeping: subprocess.Popen[bytes], tmp_path: Path) -> None:
    state = State(Recorded("keeper", "", 0, 0), str(tmp_path / "tidegate-stack-3"), pieces=(recorded(sleeping, later=-1),))
    assert not state.pieces[0].runs
    assert clean_up(tmp_path / "state.json", state) == []
    assert sleeping.poll() is None


def test_only_a_directory_of_ours_is_removed(tmp_path: Path) -> None:
    other = tmp_path / "home"
    other.mkdir()
    clean_up(tmp_path / "state.json", State(Recorded("keeper", "", 0, 0), str(other)))
    assert other.exists()


def test_a_spoilt_state_file_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text("{")
    with pytest.raises(SystemExit, match=r"state\.json cannot be read: .*; look for processes of a stack"):
        read_state(path)


def test_without_a_stack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "state.json"
    assert main(["status", "--state", str(path)]) == 1
    assert main(["down", "--state", str(path)]) == 0
    assert capsys.readouterr().out == "no stack runs; `make stack` starts one\nno stack runs\n"


@pytest.mark.parametrize("wrong", [["--instances", "0"], ["--shards", "2"], ["--replicas", "x"], ["--redis", "many"]])
def test_wrong_sizes_are_rejected(wrong: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["up", "--state", str(tmp_path / "state.json"), *wrong])
    assert wrong[1] in capsys.readouterr().err


@pytest.mark.timeout(600)
def test_up_twice_dead_and_down(tmp_path: Path) -> None:
    path = tmp_path / "state.json"

    def command(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "drills.stack_command", *words, "--state", str(path)],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def state() -> State:
        return msgspec.json.decode(path.read_bytes(), type=State)

    try:
        said = command("up", "--redis", "standalone", "--instances", "1", "--postgres-replicas", "0")
        first = state()
        assert [each.what for each in first.pieces] == [
            "haproxy",
            "tidegate 1",
            "tidegate 1 admin",
            "redis 1",
            "postgres primary",
        ]
        assert all(each.address in said for each in first.pieces)
        assert httpx.post(f"{first.url}/v1/check", json={"path": "/", "ip": "203.0.113.7"}, timeout=PATIENCE_S).status_code == 200
        assert command("up").startswith("runs already")
        assert state() == first

        os.kill(first.keeper.pid, signal.SIGKILL)
        wait_until(lambda: not first.keeper.runs, 60, "the keeper has ended")
        said = command("up", "--redis", "standalone", "--instances", "1", "--postgres-replicas", "0")
        assert "was of a stack that had died; ended" in said
        assert not any(each.runs for each in first.pieces)
        assert not Path(first.directory).exists()
        second = state()
        assert second.keeper.runs
    finally:
        command("down")
    assert not path.exists()
    assert not any(each.runs for each in (second.keeper, *second.pieces))
    assert not Path(second.directory).exists()
