"""How large a fleet must be: from daily users to instances, shards, replicas, bandwidth and cost.

Every line is a formula over measured constants (`measured.json`, written by `python -m bench`) and replaceable assumptions
(`assumptions.py`). No server and no clock is read: the same input gives the same plan. Invalid input raises `SettingsError` with
the value and how to correct it.
"""
