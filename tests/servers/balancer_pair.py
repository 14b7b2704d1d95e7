"""Two balancers that share an address over keepalived, as deployed, on a network of their own, and a Tidegate behind them."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.moments import wait_until
from tests.servers.deployed import DEPLOY, configured
from tests.servers.netns import Host, Network, Process, need_namespaces
from tests.servers.prometheus import need

VIRTUAL: Final = "10.0.0.10"
BALANCERS: Final = ("balancer1", "balancer2")
_START_S: Final = 60.0


class BalancerPair:
    """The pair; a context manager that starts all of it, and ends with both balancers on their feet and one of them active.

    Args:
        policy: of the Tidegate, which answers at all three addresses that the configuration names.
    """

    def __init__(self, policy: str) -> None:
        for program in ("haproxy", "keepalived"):
            need(program)
        need_namespaces()
        self._policy = policy
        self._stack = contextlib.ExitStack()
        self._haproxy: dict[str, Process] = {}

    def __enter__(self) -> Self:
        with self._stack:
            self.directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
            self.directory.chmod(0o755)  # the script that keepalived runs as nobody lies there
            self.network = self._stack.enter_context(
                Network(
                    {
                        "client": "10.0.0.100/24",
                        "balancer1": "10.0.0.2/24",
                        "balancer2": "10.0.0.3/24",
                        "tidegate": "10.0.0.11/24 10.0.0.12/24 10.0.0.13/24",
                    }
                )
            )
            self._start_tidegate()
            for name in BALANCERS:
                self.start_balancer(name)
            for name in BALANCERS:
                self._start_keepalived(name)
            wait_until(lambda: self.active is not None, _START_S, f"one of the balancers takes {VIRTUAL}")
            self._kept = self._stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._kept.close()

    @property
    def holders(self) -> list[str]:
        """The balancers that have the shared address now."""
        return [name for name in BALANCERS if VIRTUAL in self.network[name].addresses()]

    @property
    def active(self) -> str | None:
        """The one balancer that has the shared address; None where none or both have it."""
        holders = self.holders
        return holders[0] if len(holders) == 1 else None

    def alive(self, name: str) -> int:
        """What a balancer says of itself: 200, 503 without instances, 0 where it does not answer.

        Args:
            name: of the balancer.
        """
        asked = self.network[name].run(
            "curl",
            "--silent",
            "--output",
            "/dev/null",
            "--max-time",
            "2",
            "--write-out",
            "%{http_code}",
            "http://127.0.0.1:8405/alive",
        )
        return int(asked.stdout)

    def kill_balancer(self, name: str) -> None:
        """SIGKILL to HAProxy; keepalived goes on.

        Args:
            name: of the balancer.
        """
        self._haproxy[name].kill()

    def start_balancer(self, name: str) -> None:
        """Start HAProxy on a balancer and wait until it answers that it has instances.

        Args:
            name: of the balancer.
        """
        configuration = self.directory / f"{name}.cfg"
        configuration.write_text(
            configured(
                "haproxy/haproxy.cfg",
                {
                    "    log /dev/log local0\n": "",
                    "    log global\n    option httplog\n    option dontlog-normal\n": "",
                    "    stats socket /run/haproxy/admin.sock mode 660 level admin\n": "",
                    "maxconn 20000": "maxconn 2000",
                },
            )
        )
        self._haproxy[name] = self._run(self.network[name], f"haproxy-{name}", need("haproxy"), "-db", "-f", configuration)
        self._wait_answer(self._haproxy[name], self.network[name], "http://127.0.0.1:8405/alive")

    def log(self, name: str) -> str:
        """What a process has logged.

        Args:
            name: `keepalived-balancer1` and the like.
        """
        return (self.directory / f"{name}.log").read_text(errors="replace")

    def _start_tidegate(self) -> None:
        (self.directory / "tidegate.policy.toml").write_text(self._policy)
        environment = {
            "TIDEGATE_SERVER__HTTP": "0.0.0.0:8080",
            "TIDEGATE_SERVER__ADMIN": "127.0.0.1:8082",
            "TIDEGATE_SERVER__TRUSTED_PROXIES": "10.0.0.0/8",
        }
        host = self.network["tidegate"]
        self.tidegate = host.popen(
            sys.executable,
            "-m",
            "tidegate",
            "serve",
            directory=self.directory,
            log=self.directory / "tidegate.log",
            environment=environment,
        )
        self._stack.callback(self.tidegate.stop)
        self._wait_answer(self.tidegate, host, "http://127.0.0.1:8080/readyz")

    def _start_keepalived(self, name: str) -> None:
        configuration = self.directory / f"keepalived-{name}.conf"
        configuration.write_text(
            configured(
                "keepalived/keepalived.conf",
                # A folder below /tmp is none that keepalived would trust.
                {"/etc/keepalived/check-balancer": str(DEPLOY / "keepalived/check-balancer"), "    enable_script_security\n": ""},
            )
        )
        command: list[str | Path] = [
            need("keepalived"),
            "--dont-fork",
            "--log-console",
            "--vrrp",
            "--use-file",
            configuration,
            "--config-id",
            name,
        ]
        pids: list[str | Path] = ["--pid", self.directory / f"{name}.pid", "--vrrp_pid", self.directory / f"{name}-vrrp.pid"]
        self._run(self.network[name], f"keepalived-{name}", *command, *pids)

    def _run(self, host: Host, name: str, *command: str | Path) -> Process:
        process = host.popen(*command, directory=self.directory, log=self.directory / f"{name}.log")
        # Both while it starts and later, when the stack of the start is gone.
        getattr(self, "_kept", self._stack).callback(process.stop)
        return process

    def _wait_answer(self, process: Process, host: Host, url: str) -> None:
        def answers() -> bool:
            if process.popen.poll() is not None:
                raise RuntimeError(
                    f"it ended with {process.popen.returncode}; its log:\n{process.log.read_text(errors='replace')}"
                )
            return host.run("curl", "--silent", "--fail", "--output", "/dev/null", "--max-time", "2", url).returncode == 0

        try:
            wait_until(answers, _START_S, f"{url} answers on {host.name}")
        except TimeoutError as error:
            raise RuntimeError(f"{error}; its log:\n{process.log.read_text(errors='replace')}") from None
