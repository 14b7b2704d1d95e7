"""Random numbers apart from the generator that programs and test tools seed."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import tidegate
from tidegate.jitter import JITTER

PACKAGE = Path(tidegate.__file__).parent


def test_no_module_draws_from_the_shared_generator() -> None:
    drawn = [
        f"{module.relative_to(PACKAGE)}:{node.lineno}: random.{node.attr}"
        for module in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(module.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "random"
        and node.attr != "Random"
    ]
    assert not drawn, "use tidegate.jitter.JITTER"


def test_forked_processes_draw_other_numbers() -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, repr(JITTER.random()).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader) as read:
        assert float(read.read()) != JITTER.random()
