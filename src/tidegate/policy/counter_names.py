"""What the counters of rules are called, so that a shadow or soft rule that is enforced goes on with what it has counted."""

from __future__ import annotations

from collections.abc import Iterable

from tidegate.policy.rules import Mode, Rule


def counter_names(rules: Iterable[Rule]) -> dict[str, str]:
    """The counter of each rule of a tier, within the tier.

    A rule without a name of its own is named by what it is for, and by its mode if that is not `enforce`. Its counter is named
    without the mode, unless another rule of the tier has that counter: the two must not charge one counter.

    Args:
        rules: of one tier; names unique.

    Returns:
        Names of counters by name of the rule, unique as well.
    """
    ordered = tuple(rules)
    found = {rule.name: rule.name for rule in ordered}
    taken = set(found)
    # A soft rule answers as an enforcing one does, so of two rules it is the one that is more like it.
    for mode in (Mode.SOFT, Mode.SHADOW):
        for rule in ordered:
            if rule.mode is mode and rule.name == rule.default_name and rule.enforced_name not in taken:
                taken.add(rule.enforced_name)
                found[rule.name] = rule.enforced_name
    return found
