"""The one path of every check: caller, rule, charge, decision. Every door calls it; it knows no transport and no store.

`gate` decides checks, `callers` finds who sent them, `charging` charges several checks of one request, `usage` reads and resets
counters. When the counter store fails, the rule's `on_failure` decides; when the catalog fails, cached policy does. One event
loop uses a gate; any number of its tasks may call it at once.
"""
