"""Garbage collection, which is off from the import of this module until the first test: nothing that is loaded is garbage.

To look for garbage among it took two fifths of the 8 s of CPU time until the first test, in each process that runs tests.
"""

from __future__ import annotations

import gc

gc.disable()


def collect_from_now_on() -> None:
    """Collect what becomes garbage later; what was loaded is never looked at again."""
    gc.freeze()
    gc.enable()
