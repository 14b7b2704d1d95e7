"""envoyproxy/ratelimit as a process: the program whose configurations Tidegate reads, on a Redis of the tests.

It is written in Go and in no package registry that tests install from, so it runs only where somebody put it on the PATH:

    GOBIN=$HOME/bin go install github.com/envoyproxy/ratelimit/src/service_cmd@latest
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
import pytest

from tests.servers.ports import HOST, free_port
from tests.servers.redis_server import RedisServer

PROGRAM = "service_cmd"
START_S = 90.0
STOP_S = 10.0


def need() -> str:
    """Find the program or skip the test, saying how to get it.

    Returns:
        Its path.
    """
    path = shutil.which(PROGRAM)
    if path is None:
        pytest.skip(f"{PROGRAM} is not there: go install github.com/envoyproxy/ratelimit/src/service_cmd@latest")
    return path


class RateLimitPeer:
    """One process.

    Args:
        config: text of its one configuration file.
        redis: where it counts.
    """

    def __init__(self, config: str, redis: RedisServer) -> None:
        self._program = need()
        self.address = f"{HOST}:{free_port()}"
        self._made = tempfile.TemporaryDirectory(prefix="tidegate-peer-")
        directory = Path(self._made.name)
        (directory / "ratelimit" / "config").mkdir(parents=True)
        (directory / "ratelimit" / "config" / "config.yaml").write_text(config)
        self._log = directory / "peer.log"
        self._environment = {
            **os.environ,
            "GRPC_HOST": HOST,
            "GRPC_PORT": self.address.rpartition(":")[2],
            "HOST": HOST,
            "PORT": str(free_port()),
            "DEBUG_HOST": HOST,
            "DEBUG_PORT": str(free_port()),
            "USE_STATSD": "false",
            "RUNTIME_ROOT": str(directory),
            "RUNTIME_SUBDIRECTORY": "ratelimit",
            "RUNTIME_WATCH_ROOT": "false",
            "RESPONSE_DYNAMIC_METADATA": "true",
            "REDIS_SOCKET_TYPE": "tcp",
            "REDIS_URL": f"{HOST}:{redis.port}",
            "CACHE_KEY_PREFIX": f"peer{time.time_ns()}",
        }
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self.process = subprocess.Popen([self._program], env=self._environment, stdout=log, stderr=log)
        try:
            with grpc.insecure_channel(self.address) as channel:
                grpc.channel_ready_future(channel).result(timeout=START_S)
        except grpc.FutureTimeoutError:
            said = self._log.read_text()[-4000:]
            self.__exit__(None, None, None)
            raise RuntimeError(f"the peer does not serve:\n{said}") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._made.cleanup()
