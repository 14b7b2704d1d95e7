"""What clients of a drill were admitted, as a log: written by each client, read and sorted in bounded memory.

A line is a JSON array `[limits, subject, cost, allowed, degraded, from_us, to_us]`: the name of what counted (`tier:rule`, or
`tier` for the tier's own limits), whom it counted, units, the answer, whether it was given without the store, and between which
moments it was given, µs since the epoch. Where the answer tells the store's clock the two are the same; else they are when the
check was sent and when its answer came. A check that is counted by several limit sets has a line for each.
"""

from __future__ import annotations

import heapq
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Annotated, Final

import msgspec

from tidegate.decision import Decision

IN_MEMORY: Final = 200_000
"""So many admissions are sorted at once, about 60 MB; more are sorted in files."""
_MAX_US: Final = 253_000_000_000_000_000
"""9987-04-17: no calendar reaches much further."""

_Moment = Annotated[int, msgspec.Meta(ge=0, le=_MAX_US)]


class Admission(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One answer to one check, as one limit set counted it.

    Args:
        limits: name of the limit set: `tier:rule`, or `tier` for a tier's own limits.
        cost: units.
        allowed: the answer.
        degraded: whether it was given without the store.
        from_us: it was not given before this moment, µs since the epoch.
        to_us: nor after this one; the same where the moment is known.
    """

    limits: str
    subject: str
    cost: Annotated[int, msgspec.Meta(ge=0, le=1_000_000_000)]
    allowed: bool
    degraded: bool
    from_us: _Moment
    to_us: _Moment


class LogError(Exception):
    """A log that cannot be read: which file and line, why, and the remedy."""


def admission_of(decision: Decision, subject: str, cost: int, sent_us: int, received_us: int) -> Admission:
    """What an answer says of the rule that gave it.

    Args:
        decision: the answer; its limits must be known.
        subject: whom they count.
        cost: of the check.
        sent_us: when it was sent, µs since the epoch.
        received_us: when the answer came.

    Returns:
        The admission. Its moment is the store's, where the store decided; a fallback knows the store's clock only roughly.
    """
    if decision.limits is None:
        raise ValueError("no limit counted this check")
    known = not decision.degraded and decision.at_us > 0
    return Admission(
        decision.limits.name,
        subject,
        cost,
        decision.allowed,
        decision.degraded,
        decision.at_us if known else sent_us,
        decision.at_us if known else received_us,
    )


class AdmissionLog:
    """A log that one client writes.

    Args:
        path: of the file; what it holds already stays.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")

    def write(self, admission: Admission) -> None:
        """Add a line.

        Args:
            admission: what happened.
        """
        self._file.write(msgspec.json.encode(admission) + b"\n")

    def __enter__(self) -> AdmissionLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()


def read_log(path: Path, unfinished: list[Path] | None = None) -> Iterator[Admission]:
    """Read a log line by line.

    Args:
        unfinished: is given the path where the last line is not whole, as a client leaves it that is killed.

    Yields:
        Each answer.

    Raises:
        LogError: if the file or a line cannot be read.
    """
    decoder = msgspec.json.Decoder(Admission)
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    admission = decoder.decode(line)
                except msgspec.DecodeError as error:
                    if not line.endswith(b"\n"):
                        if unfinished is not None:
                            unfinished.append(path)
                        return
                    raise LogError(
                        f"{path}:{number}: {error}: a line is [limits, subject, cost, allowed, degraded, from_us, to_us]"
                    ) from None
                if admission.from_us > admission.to_us:
                    raise LogError(
                        f"{path}:{number}: from_us {admission.from_us} is after to_us {admission.to_us}: "
                        "log the moment of sending first, both by one clock that is not stepped"
                    )
                yield admission
    except OSError as error:
        raise LogError(f"{path}: the log cannot be read: {error.strerror or error}") from None


def in_order(admissions: Iterable[Admission], in_memory: int = IN_MEMORY) -> Iterator[Admission]:
    """Sort admissions by what counted them, then by their latest moment.

    Args:
        in_memory: so many are held at once, 1 or more; the others wait in temporary files.

    Yields:
        Each of them.
    """
    with ExitStack() as files:
        runs: list[IO[bytes]] = []
        held: list[Admission] = []
        for admission in admissions:
            held.append(admission)
            if len(held) >= in_memory:
                run = files.enter_context(tempfile.TemporaryFile())
                run.writelines(msgspec.json.encode(each) + b"\n" for each in sorted(held, key=_place))
                run.seek(0)
                runs.append(run)
                held = []
        decoder = msgspec.json.Decoder(Admission)
        yield from heapq.merge(*(map(decoder.decode, run) for run in runs), sorted(held, key=_place), key=_place)


def _place(admission: Admission) -> tuple[str, str, int, int]:
    return admission.limits, admission.subject, admission.to_us, admission.from_us
