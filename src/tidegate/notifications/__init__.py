"""Webhooks for `[[notify]]`: crossed thresholds, expired and revoked API keys, and blocks.

`events` makes rows of what happened, with ids that every instance computes alike, so that one event becomes one row per URL.
`storage` is the queue in the database, bounded, from which any instance claims rows; `delivery` signs and sends one; `notifier`
runs both, and `sources` reads what the database knows of keys and blocks.

On failure: while the database is unavailable, crossings wait in memory, bounded, and are lost with the process. A delivery whose
result could not be stored is repeated with the same id. Checks never wait for any of this.
"""

from __future__ import annotations
