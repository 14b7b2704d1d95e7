"""The tutorials and the page on plans, as their readers paste them.

Files are saved, commands are run, and what is shown as the output is the output. Each runs in an empty folder and in a network
namespace of its own, because its text uses the default ports.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.moments import wait_until
from tests.servers.netns import Host, Network, need_namespaces
from tests.servers.prometheus import need

ROOT = Path(__file__).parents[2]
TUTORIALS = ROOT / "docs" / "tutorials"
DAY_S = 86_400
TIMEOUT_S = 300
PROGRAMS = {
    "../plans": (),
    "nginx": ("nginx",),
    "fastapi": (),
    "operate": ("prometheus", "promtool", "prometheus-alertmanager", "amtool"),
}
_BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    file: str | None
    text: str


def blocks_of(page: Path) -> list[Block]:
    return [Block(*found) for found in _BLOCK.findall(page.read_text())]


def pattern_of(expected: str) -> re.Pattern[str]:
    """What shown output means: `…` stands for anything within a line."""
    return re.compile("".join(".*" if part == "…" else re.escape(part) for part in re.split("(…)", expected)))


class Terminal:
    """One bash in a folder; blocks run in it one after the other, so that variables and background jobs stay."""

    def __init__(self, host: Host, folder: Path) -> None:
        self._host = host
        self._folder = folder
        self._script = tempfile.mkdtemp(prefix="tidegate-tutorial-script-")
        self._script_folder = Path(self._script)

    def run(self, blocks: list[Block]) -> list[str]:
        """Save the files and run the commands of a page.

        Args:
            blocks: of the page.

        Returns:
            What each block of commands printed.
        """
        lines = ["set -e"]
        outputs = []
        for number, block in enumerate(blocks):
            source = self._script_folder / f"{number}.{block.language}"
            source.write_text(block.text)
            if block.file:
                lines.append(f"cp {source} {block.file}")
            elif block.language == "sh":
                outputs.append(self._script_folder / f"{number}.output")
                lines.append(f"source {source} > {outputs[-1]} 2>&1 < /dev/null")
        script = self._script_folder / "all.sh"
        script.write_text("\n".join([*lines, "echo done", ""]))
        log = self._script_folder / "log"
        environment = {
            "CLONE": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin",
            "HOME": str(self._folder),
        }
        process = self._host.popen("bash", str(script), directory=self._folder, log=log, environment=environment)
        try:
            ended = process.popen.wait(TIMEOUT_S)
            said = "\n".join(f"--- {path.name}\n{path.read_text()}" for path in [*outputs, log] if path.exists())
            assert ended == 0, f"ended with {ended}:\n{said}\n{self._logs()}"
            assert not self._left(), "the page leaves processes running"
        except subprocess.TimeoutExpired:
            shown = "\n".join(path.read_text() for path in outputs if path.exists())
            raise AssertionError(f"the page does not end; so far:\n{shown}\n{self._logs()}") from None
        finally:
            process.kill()
            for pid in self._left():
                os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not self._left(), what="the processes of the page end")
        return [path.read_text() for path in outputs]

    def close(self) -> None:
        shutil.rmtree(self._script_folder)

    def _left(self) -> list[int]:
        listed = subprocess.run(["ip", "netns", "pids", self._host.name], capture_output=True, text=True, timeout=30, check=True)
        return [int(pid) for pid in listed.stdout.split()]

    def _logs(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()[-2000:]}" for log in self._folder.glob("*.log"))


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    need_namespaces()
    # Not a folder of pytest's: those are for root alone, and nginx's workers are someone else.
    folder = Path(tempfile.mkdtemp(prefix="tidegate-tutorial-"))
    folder.chmod(0o755)
    with Network({"tutorial": "10.99.0.2/24"}) as network:
        terminal = Terminal(network["tutorial"], folder)
        yield terminal
        terminal.close()
    shutil.rmtree(folder)


def test_each_tutorial_is_run() -> None:
    assert {page.stem for page in TUTORIALS.glob("*.md")} == set(PROGRAMS) - {"../plans"}


@pytest.mark.timeout(2 * TIMEOUT_S)
@pytest.mark.parametrize("name", PROGRAMS)
def test_tutorial(name: str, terminal: Terminal) -> None:
    for program in PROGRAMS[name]:
        need(program)
    blocks = blocks_of(TUTORIALS / f"{name}.md")
    outputs = iter(terminal.run(blocks))
    checked = 0
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        if block.language != "sh" or block.file:
            continue
        output = next(outputs)
        if following is not None and following.language == "text":
            expected = following.text.splitlines()
            printed = output.splitlines()
            shown = f"{block.text}printed\n{output}instead of\n{following.text}"
            assert len(printed) == len(expected), shown
            for is_, should in zip(printed, expected, strict=True):
                assert pattern_of(should).fullmatch(is_), shown
            checked += 1
    assert checked == sum(block.language == "text" for block in blocks), "each shown output follows its commands"
