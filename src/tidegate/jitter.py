"""Random numbers for pauses, lifetimes and samples, apart from the `random` module's own generator.

Programs and test tools seed that one and expect the same numbers again: a library that draws from it, in a background task
for instance, changes what they get.
"""

from __future__ import annotations

import os
import random
from typing import Final

JITTER: Final = random.Random()
"""Not for secrets. Forked processes draw different numbers, as they do from `random` itself."""

os.register_at_fork(after_in_child=JITTER.seed)
