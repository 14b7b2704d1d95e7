"""What the pipeline does with replies that announce more than can come."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from tests.moments import PATIENCE_S

PROGRAM = textwrap.dedent("""
    import asyncio, resource, sys
    from tidegate.counters.redis.pipeline import ConnectionOptions, Pipeline

    class Dropped(Pipeline):
        def drop(self, why):
            print("dropped:", why)

        def _pushed(self, push):
            raise AssertionError(push)

        def _unexpected_reply(self, reply):
            raise AssertionError(reply)

    async def main():
        pipeline = Dropped(ConnectionOptions())
        pipeline.up = True
        sent = pipeline.send(b"PING")
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
        pipeline.data_received(sys.argv[1].encode() + b"\\r\\n")
        assert not sent.done(), "no reply was complete"
        # Not ru_maxrss: a child begins with that of the process that started it.
        with open("/proc/self/status") as status:
            (peak_kb,) = [int(line.split()[1]) for line in status if line.startswith("VmHWM:")]
        print("resident below 200 MB:", peak_kb < 200_000)

    asyncio.run(main())
""")


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ("*1000000", None),
        ("*400000000", "dropped: protocol error: a reply announces more elements than fit in memory"),
        ("*4294967296", "dropped: protocol error: Multi-bulk length out of range"),
        ("*-2", "dropped: protocol error: Multi-bulk length out of range"),
    ],
)
def test_a_forged_array_header_takes_no_memory(header: str, why: str | None) -> None:
    made = subprocess.run(
        [sys.executable, "-c", PROGRAM, header], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert made.returncode == 0, made.stderr
    lines = made.stdout.splitlines()
    assert lines[-1] == "resident below 200 MB: True"
    assert lines[:-1] == ([] if why is None else [why])
