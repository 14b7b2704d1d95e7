"""The configurations of envoyproxy/ratelimit: taken or refused as documented, beside that program itself where it is there."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cases.ratelimit_upstream import FILES
from tidegate.doors.grpc.ratelimit_file import parse_ratelimit
from tidegate.errors import PolicyError

CHECKER = "config_check_cmd"


@pytest.mark.parametrize("name", FILES)
def test_each_has_its_verdict(name: str) -> None:
    case = FILES[name]
    texts = [(f"{number}.yaml", text) for number, text in enumerate(case.texts)]
    if case.limits is None:
        with pytest.raises(PolicyError) as refused:
            parse_ratelimit(texts)
        assert case.refused in refused.value.reason
        assert refused.value.file is not None
        return
    read = parse_ratelimit(texts)
    assert sum(each.limits for each in read) == case.limits
    notes = [note for each in read for note in each.notes]
    assert [any(f"'{name}'" in note for note in notes) for name in case.notes] == [True] * len(case.notes)
    assert len(notes) == len(case.notes)


@pytest.mark.skipif(shutil.which(CHECKER) is None, reason=f"{CHECKER} of envoyproxy/ratelimit is not on the PATH")
@pytest.mark.parametrize("name", FILES)
def test_the_peer_gives_the_verdict_of_the_table(name: str, tmp_path: Path) -> None:
    for number, text in enumerate(FILES[name].texts):
        (tmp_path / f"{number}.yaml").write_text(text)
    done = subprocess.run([CHECKER, "-config_dir", str(tmp_path)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode == 0) == FILES[name].theirs, done.stdout + done.stderr
