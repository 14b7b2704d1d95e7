"""The usage ledger and the traffic history: how many units were admitted, blocked and over a limit, for whom and when.

| what | by | kept |
|---|---|---|
| usage ledger | day, customer, API key, tier and rule; exact | `ledger.keep_days` |
| traffic by rule | minute, then hour; exact | `ledger.traffic_days` |
| traffic by caller | hour, tier, rule and subject; those with the most units | `ledger.traffic_days` |
| latency | minute, then hour, and bucket | `ledger.traffic_days` |

`aggregate` counts checks in bounded memory (`caller_table`); `buffer` adds up what was not written yet; `writer` writes it every
few seconds in batches, each of which `storage` applies once, however often it is repeated. `maintenance` rolls up and deletes,
`queries` reads traffic, and `export` the ledger.

While the database fails, counts are added up in bounded memory. A process that is killed loses what it counted since its last
write. Any number of processes may write concurrently; each has one event loop.
"""
