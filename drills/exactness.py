"""Proves from the logs of all clients that no window of any limit held more than allowed, or says what was above and when.

    python -m drills.exactness LOG... --policy FILE [--skew-ms MS] [--json]

Logs are as `drills.admissions` describes them, one for each client, in any order. Where an answer contains the store's clock its
moment is known; elsewhere it is known to lie between sending and receiving, and only what is above the limit in every case counts
as excess. What was admitted while the store was away ("degraded") counts too; beside it stands the excess of what the store alone
admitted. All logs of the run are needed, and the policy must not have changed meanwhile. Memory does not grow with the logs:
they are sorted in files. Ends with 0 where there is no excess, 1 where there is, 2 where a log or the policy cannot be read.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec

from drills.admissions import Admission, LogError, in_order, read_log
from drills.proofs import Excess, Proof, proof_of
from tidegate.errors import PolicyError
from tidegate.policy.limits import Limit, LimitSet
from tidegate.policy.matching import CompiledTier
from tidegate.policy.model import Policy
from tidegate.policy.toml_reader import load_policy

LimitsOf = Callable[[str, str], LimitSet]
"""From the name of a limit set and a subject to what holds for it; raises KeyError for a name that is not known."""


class Report(msgspec.Struct):
    """What one limit held.

    Args:
        limits: name of the limit set.
        limit: its text; where a key has a limit of its own, that stands apart.
        subjects: that were admitted anything.
        units: of these.
        degraded_units: those of them that were admitted without the store.
        uncertain: admissions of which the moment is not known.
        widest_us: width of the widest interval in which one of these lies, µs.
        excess_units: above the limit for certain, at the worst moment of each subject, all subjects together.
        store_excess_units: the same of what the store alone admitted.
        worst_subject: who has the greatest excess.
        worst: how much and when.
    """

    limits: str
    algorithm: str
    limit: str
    subjects: int = 0
    admissions: int = 0
    units: int = 0
    degraded_units: int = 0
    uncertain: int = 0
    widest_us: int = 0
    excess_units: int = 0
    excess_subjects: int = 0
    store_excess_units: int = 0
    worst_subject: str | None = None
    worst: Excess | None = None


class Counts(msgspec.Struct):
    """What the logs held that is no admission, and how wide the intervals are.

    Args:
        answers: all lines.
        denied: checks that were denied.
        widest_us: by name of the limit set, µs.
    """

    answers: int = 0
    denied: int = 0
    widest_us: dict[str, int] = {}


class _Watched:
    """One limit of one subject: all its admissions, and those of the store alone."""

    def __init__(self, limits: LimitSet, limit: Limit, widest_us: int) -> None:
        self.limit = limit
        self._proofs: tuple[Proof, Proof] = (
            proof_of(limits.algorithm, limit, widest_us),
            proof_of(limits.algorithm, limit, widest_us),
        )
        self.worst: list[Excess | None] = [None, None]

    def add(self, admission: Admission) -> None:
        for which in (0,) if admission.degraded else (0, 1):
            found = self._proofs[which].add(admission.from_us, admission.to_us, admission.cost)
            held = self.worst[which]
            if found is not None and (held is None or found.units > held.units):
                self.worst[which] = found


def admitted(answers: Iterable[Admission], counts: Counts, skew_us: int = 0) -> Iterator[Admission]:
    """What counts of the answers; the rest is noted.

    Args:
        answers: of all clients, in any order.
        counts: is filled while they are gone through.
        skew_us: so far may a client's clock be from the store's, µs.

    Yields:
        Those that were admitted and cost something.
    """
    for answer in answers:
        counts.answers += 1
        counts.denied += not answer.allowed
        if not answer.allowed or not answer.cost:
            continue
        admission = answer
        if skew_us and answer.from_us != answer.to_us:
            admission = msgspec.structs.replace(answer, from_us=max(answer.from_us - skew_us, 0), to_us=answer.to_us + skew_us)
        width = admission.to_us - admission.from_us
        counts.widest_us[admission.limits] = max(width, counts.widest_us.get(admission.limits, 0))
        yield admission


def prove(answers: Iterable[Admission], limits_of: LimitsOf, counts: Counts | None = None, skew_us: int = 0) -> list[Report]:
    """Hold what was admitted against the limits.

    Args:
        answers: of all clients, in any order.
        limits_of: what holds.
        counts: is filled, where it is given.
        skew_us: see `admitted`.

    Returns:
        A report for each limit that admitted anything.

    Raises:
        KeyError: with the name of a limit set that is not known.
    """
    counts = counts or Counts()
    reports: dict[tuple[str, str], Report] = {}
    # The widest intervals are known only once all was read: `in_order` has read all before it gives the first.
    ordered = in_order(admitted(answers, counts, skew_us))
    for (name, subject), admissions in groupby(ordered, key=lambda each: (each.limits, each.subject)):
        limits = limits_of(name, subject)
        watched = [_Watched(limits, limit, counts.widest_us[name]) for limit in limits.limits]
        seen = Report(name, limits.algorithm, "")
        for admission in admissions:
            seen.admissions += 1
            seen.units += admission.cost
            seen.degraded_units += admission.cost if admission.degraded else 0
            seen.uncertain += admission.from_us != admission.to_us
            seen.widest_us = max(seen.widest_us, admission.to_us - admission.from_us)
            for each in watched:
                each.add(admission)
        for each in watched:
            report = reports.setdefault((name, each.limit.text), Report(name, limits.algorithm, each.limit.text))
            _take_in(report, subject, seen, each)
    return list(reports.values())


def _take_in(report: Report, subject: str, seen: Report, watched: _Watched) -> None:
    """Add what was seen of one subject to the report of a limit."""
    report.subjects += 1
    report.admissions += seen.admissions
    report.units += seen.units
    report.degraded_units += seen.degraded_units
    report.uncertain += seen.uncertain
    report.widest_us = max(report.widest_us, seen.widest_us)
    worst, of_store = watched.worst
    report.store_excess_units += 0 if of_store is None else of_store.units
    if worst is not None:
        report.excess_units += worst.units
        report.excess_subjects += 1
        if report.worst is None or worst.units > report.worst.units:
            report.worst_subject, report.worst = subject, worst


def limits_of_policy(policy: Policy) -> LimitsOf:
    """What a policy says of each name and subject.

    Args:
        policy: active during the run.

    Returns:
        A function; see `LimitsOf`. A key's own limits hold for its subject `k:…`.
    """
    tiers = {tier.name: tier for tier in policy.tiers}
    by_name = {limits.name: limits for tier in tiers.values() for limits in _sets_of(CompiledTier(tier))}
    by_subject = {
        (limits.name, f"k:{key.id}"): limits
        for key in policy.api_keys
        if key.overrides
        for limits in _sets_of(CompiledTier(tiers[key.tier], key.overrides))
    }

    def limits_of(name: str, subject: str) -> LimitSet:
        return by_subject.get((name, subject)) or by_name[name]

    return limits_of


def _sets_of(tier: CompiledTier) -> list[LimitSet]:
    return [rule.limits for rule in tier.rules] + ([] if tier.limits is None else [tier.limits])


def as_text(reports: Sequence[Report], counts: Counts, unfinished: Sequence[Path]) -> str:
    """The report for people.

    Args:
        reports: of all limits.
        counts: of the logs.
        unfinished: logs whose last line was left out.

    Returns:
        Lines.
    """
    lines = [f"{counts.answers} answers, {counts.denied} of them denials"]
    lines += [f"{path}: the last line is not whole and was left out" for path in unfinished]
    for report in reports:
        lines.append(f"{report.limits}  {report.limit}  {report.algorithm}")
        degraded = f", {report.degraded_units} of them without the store" if report.degraded_units else ""
        lines.append(f"  admitted  {report.units} units in {report.admissions} checks of {report.subjects} subjects{degraded}")
        if report.uncertain:
            lines.append(
                f"  unsure    {report.uncertain} of these checks are known to within {report.widest_us / 1000:.1f} ms at worst; "
                "what depends on it is not counted"
            )
        if report.worst is None:
            lines.append("  excess    none")
            continue
        worst = report.worst
        lines.append(
            f"  EXCESS    {report.excess_units} units over {report.excess_subjects} subjects "
            f"(of what the store alone admitted: {report.store_excess_units})"
        )
        lines.append(
            f"  worst     {report.worst_subject}: {worst.held} where {worst.allowed} are allowed, "
            f"{_moment(worst.from_us)} to {_moment(worst.to_us)}"
        )
    excess = sum(report.excess_units for report in reports)
    lines.append(f"{excess} units above the limits" if excess else "no window of any limit held more than allowed")
    return "\n".join(lines)


def _moment(us: int) -> str:
    moment = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(microseconds=us)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _as_json(reports: Sequence[Report], counts: Counts, unfinished: Sequence[Path]) -> Mapping[str, Any]:
    limits = [
        {
            **{name: getattr(report, name) for name in Report.__struct_fields__ if name != "worst"},
            "worst": None if report.worst is None else report.worst._asdict(),
        }
        for report in reports
    ]
    return {
        "answers": counts.answers,
        "denied": counts.denied,
        "excess_units": sum(report.excess_units for report in reports),
        "unfinished": [str(path) for path in unfinished],
        "limits": limits,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the logs that are named.

    Args:
        arguments: of the command; those of the process where not given.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="python -m drills.exactness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="what a client logged")
    parser.add_argument("--policy", type=Path, required=True, metavar="FILE", help="the policy that was active")
    parser.add_argument(
        "--skew-ms", type=float, default=0.0, metavar="MS", help="how far a client's clock may be from the store's; default 0"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    asked = parser.parse_args(arguments)
    if not 0 <= asked.skew_ms <= 86_400_000:
        parser.error(f"--skew-ms {asked.skew_ms:g} must be from 0 to 86400000")
    counts, unfinished = Counts(), list[Path]()
    try:
        limits_of = limits_of_policy(load_policy(asked.policy))
        answers = (answer for path in asked.logs for answer in read_log(path, unfinished))
        reports = prove(answers, limits_of, counts, round(asked.skew_ms * 1000))
    except (LogError, PolicyError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyError as error:
        print(
            f"the logs name the limits {error.args[0]!r}, which {asked.policy} does not have: "
            "give the policy of the run; names are 'tier:rule', or 'tier' for a tier's own limits",
            file=sys.stderr,
        )
        return 2
    if not counts.answers:
        # An empty log proves nothing, and most often means that the drill did not run.
        print(f"no answer found in {', '.join(map(str, asked.logs))}: did the clients log?", file=sys.stderr)
        return 2
    found = any(report.excess_units for report in reports)
    print(json.dumps(_as_json(reports, counts, unfinished), indent=2) if asked.json else as_text(reports, counts, unfinished))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
