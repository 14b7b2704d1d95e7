"""What a change of the policy would have done to recorded traffic, before it is made.

Without an access log, the traffic history gives bounds for one rule: see `what_if_history`. A log is replayed twice by `tidegate
simulate`, as the policy is and as it would be: in a process of its own with low priority, so that no check waits for it, and so
that it can be cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec

from tidegate.admin.import_export import export_policy
from tidegate.admin.lists import get_rule
from tidegate.admin.rules import RULE_FIELDS, CatalogEditor
from tidegate.admin.what_if_history import estimate
from tidegate.admin.what_if_runs import CANCELLED, DONE, FAILED, WhatIfRead, end_run, note_progress, read_run, start_run
from tidegate.errors import BadRequest, CatalogError, TidegateError
from tidegate.policy.model import Policy, Tier
from tidegate.policy.rules import Rule
from tidegate.policy.toml_reader import parse_policy
from tidegate.policy.toml_writer import policy_text

logger = logging.getLogger(__name__)

MAX_AT_ONCE: Final = 2
"""Maximum number of runs that one process works on."""
MAX_LOG_BYTES: Final = 16_000_000
MAX_RULES: Final = 500
"""Maximum number of rules in a result: those with most requests."""
TIMEOUT_S: Final = 600.0

MAX_RULE_ID: Final = 2**53
"""As the routes of rules: the largest whole number that every JSON reader keeps."""
_MAX_SUBJECTS: Final = 200_000
_TICK_S: Final = 1.0
_MAX_MESSAGE: Final = 1_000


class RuleChange(msgspec.Struct, forbid_unknown_fields=True):
    """Fields of a rule that would change; omitted ones stay as they are."""

    id: Annotated[int, msgspec.Meta(ge=1, le=MAX_RULE_ID)]
    limits: list[str] | None = None
    mode: Literal["enforce", "shadow"] | None = None


class WhatIf(msgspec.Struct, forbid_unknown_fields=True):
    """A change to try: a policy, or one rule.

    Args:
        policy: a whole policy file.
        rule: changed fields of one rule.
        log: an access log in a format of `tidegate simulate`; without one, the traffic history of the rule is used.
        tier: of requests without an API key of the policy; by default that of the rule, or the policy's own for such requests.
        subject: what identifies a caller in the log: ip, user, or a field.
    """

    policy: str | None = None
    rule: RuleChange | None = None
    log: str | None = None
    tier: str | None = None
    subject: str = "ip"


class TooManyRuns(CatalogError):
    """This process works on as many runs as it may."""


class WhatIfRuns:
    """Starts runs and works on them.

    Args:
        editor: of the catalog whose policy is compared.
    """

    def __init__(self, editor: CatalogEditor) -> None:
        self._editor = editor
        self._database = editor.catalog.database
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, actor: str, given: WhatIf) -> WhatIfRead:
        """Start a run.

        Returns:
            The run, which goes on in the background.

        Raises:
            BadRequest: if the change is not given, or it is a policy and there is no log.
            PolicyError: if the change is not valid.
            NotFound: if there is no such rule.
            TooManyRuns: if this process works on `MAX_AT_ONCE` already.
            CatalogUnavailable: if the database does not answer.
        """
        if (given.policy is None) == (given.rule is None):
            raise BadRequest("what-if needs exactly one of policy and rule")
        if given.log is not None and len(given.log) > MAX_LOG_BYTES:
            raise BadRequest(f"the log has more than {MAX_LOG_BYTES} characters: send a part of it, or use tidegate simulate")
        rules = None if given.rule is None else await self._rules(given.rule)
        if not given.log and (rules is None or given.log is not None):
            raise BadRequest("the log is missing: send the text of an access log", field="log")
        if given.log:
            before, after, tier = await self._policies(given, rules)
        if len(self._tasks) >= MAX_AT_ONCE:
            raise TooManyRuns(f"{MAX_AT_ONCE} runs are under way in this process: wait for one of them, or cancel it")
        run_id = await start_run(self._database, actor)
        if given.log:
            work = self._replay(run_id, given.log, (before, after), tier, given.subject)
        else:
            assert rules is not None
            work = estimate(self._database, *rules)
        task = asyncio.create_task(self._work(run_id, work), name="what_if")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await read_run(self._database, run_id)

    async def read(self, run_id: str) -> WhatIfRead:
        """Read a run.

        Raises:
            NotFound: if there is none with this id.
            CatalogUnavailable: if the database does not answer.
        """
        return await read_run(self._database, run_id)

    async def cancel(self, run_id: str) -> WhatIfRead:
        """Cancel a run; one that has ended stays as it is.

        Raises:
            NotFound: if there is none with this id.
            CatalogUnavailable: if the database rejects it.
        """
        await read_run(self._database, run_id)
        await end_run(self._database, run_id, CANCELLED)
        return await read_run(self._database, run_id)

    async def close(self) -> None:
        """End all runs of this process."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _rules(self, change: RuleChange) -> tuple[str, Rule, Rule]:
        """The tier of a rule, the rule as it is, and as it would be."""
        row = await get_rule(self._editor, change.id)
        fields = row.model_dump(include=RULE_FIELDS)
        changed = {"limits": change.limits, "mode": change.mode}
        return (
            row.tier,
            Rule.make(**fields),
            Rule.make(**{**fields, **{name: value for name, value in changed.items() if value is not None}}),
        )

    async def _policies(self, given: WhatIf, rules: tuple[str, Rule, Rule] | None) -> tuple[Policy, Policy, str | None]:
        """The policy as it is and as it would be, and the tier of callers without a key."""
        before = await export_policy(self._editor)
        if rules is not None:
            tier, _, changed = rules
            return before, _with_rule(before, tier, changed), given.tier or tier
        after = await asyncio.to_thread(parse_policy, given.policy or "")
        names = {each.name for each in after.tiers}
        if not after.api_keys:
            kept = tuple(key for key in before.api_keys if key.tier in names)
            after = msgspec.structs.replace(after, api_keys=kept)
        return before, after, given.tier

    async def _work(self, run_id: str, replay: Coroutine[Any, Any, dict[str, Any]]) -> None:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                result = await replay
            await end_run(self._database, run_id, DONE, result)
        except _Cancelled:
            logger.info("what-if run %s was cancelled", run_id)
        except TimeoutError:
            await self._fail(run_id, f"it took longer than {TIMEOUT_S:g} s: take a part of the log, or use tidegate simulate")
        except TidegateError as error:
            await self._fail(run_id, error.message)
        except asyncio.CancelledError:
            await self._fail(run_id, "the server was stopped: start it again")
            raise
        except Exception:
            logger.exception("what-if run %s failed", run_id)
            await self._fail(run_id, "internal error: see the log of the server")

    async def _fail(self, run_id: str, message: str) -> None:
        try:
            await end_run(self._database, run_id, FAILED, {"message": message[:_MAX_MESSAGE]})
        except TidegateError as error:
            logger.warning("the end of what-if run %s was not written: %s", run_id, error)

    async def _replay(
        self, run_id: str, log: str, policies: tuple[Policy, Policy], tier: str | None, subject: str
    ) -> dict[str, Any]:
        """Replay a log under each policy; returns the reports."""
        with tempfile.TemporaryDirectory(prefix="tidegate-what-if-", ignore_cleanup_errors=True) as directory:
            path = Path(directory, "log")
            await asyncio.to_thread(path.write_text, log, "utf-8", "surrogatepass")
            reports = []
            for number, policy in enumerate(policies):
                file = Path(directory, f"{number}.toml")
                await asyncio.to_thread(_write_policy, file, policy)

                async def note(share: float, done: int = number) -> None:
                    if not await note_progress(self._database, run_id, (done + share) / len(policies)):
                        raise _Cancelled

                reports.append(await _simulate(path, file, tier, subject, note))
        return {"before": reports[0], "after": reports[1], "note": _notes(reports[1])}


class _Cancelled(Exception):
    """The run was cancelled."""


async def _simulate(
    log: Path, policy: Path, tier: str | None, subject: str, note: Callable[[float], Coroutine[Any, Any, None]]
) -> dict[str, Any]:
    """Run `tidegate simulate`, and note its progress."""
    command = [sys.executable, "-m", "tidegate", "simulate", str(log), f"--policy={policy}", f"--subject={subject}"]
    command += [f"--max-subjects={_MAX_SUBJECTS}", "--json", "--background", *([] if tier is None else [f"--tier={tier}"])]
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=64 * 1024 * 1024,
        cwd=policy.parent,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    share, message = 0.0, b""

    async def follow(stderr: asyncio.StreamReader) -> None:
        nonlocal share, message
        async for line in stderr:
            if line.startswith(b"progress "):
                share = float(line.split()[1])
            else:
                message = (message + line)[:_MAX_MESSAGE]

    try:
        reading = asyncio.gather(process.stdout.read(), follow(process.stderr), process.wait())
        while not reading.done():
            await asyncio.wait({reading}, timeout=_TICK_S)
            await note(min(share, 1.0))
        output = reading.result()[0]
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode != 0:
        text = message.decode(errors="replace").replace(str(log), "the log").removeprefix("tidegate: ").strip()
        raise BadRequest(text or f"the simulation ended with exit code {process.returncode}")
    report: dict[str, Any] = await asyncio.to_thread(msgspec.json.decode, output)
    report.pop("series", None)
    counted = [each for each in report["rules"] if each["requests"]]
    report["rules"] = sorted(counted, key=lambda each: -each["requests"])[:MAX_RULES]
    return report


def _write_policy(file: Path, policy: Policy) -> None:
    file.write_text(policy_text(policy), "utf-8")


def _with_rule(policy: Policy, tier: str, changed: Rule) -> Policy:
    """The policy with one rule replaced by one of the same name."""

    def replaced(each: Tier) -> Tier:
        if each.name != tier:
            return each
        rules = tuple(changed if rule.name == changed.name else rule for rule in each.rules)
        return msgspec.structs.replace(each, rules=rules)

    return msgspec.structs.replace(policy, tiers=tuple(replaced(each) for each in policy.tiers))


def _notes(report: dict[str, Any]) -> str | None:
    """What the reader has to know of a report."""
    notes = []
    if report["malformed"]:
        notes.append(f"{report['malformed']} of {report['lines']} lines are malformed and left out.")
    if report["unknown_keys"]:
        notes.append(f"{report['unknown_keys']} requests have unknown API keys and count as requests without a key.")
    if report["evicted"]:
        notes.append("There are more callers than are counted: some requests count as allowed too often.")
    return " ".join(notes) or None
