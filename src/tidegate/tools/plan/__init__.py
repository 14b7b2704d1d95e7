"""How large a fleet must be: from daily users to instances, shards, replicas, bandwidth and cost.

Every line is a formula over measured constants (`measured.json`, written by `python -m bench`) and assumptions (`assumptions.py`,
all of them replaceable). Nothing here asks a server or a clock; the same input gives the same plan. A wrong input raises
`SettingsError` with the value and the remedy.
"""
