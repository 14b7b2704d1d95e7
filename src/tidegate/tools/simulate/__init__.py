"""Replay of access logs under a policy: what would it have allowed and blocked?

Access logs are read line by line (`log_lines`; `log_formats` recognizes what `log_text` and `log_records` parse), put
into time order in bounded memory (`time_order`), decided in the log's own time by the same rules and counters as live traffic
(`replay`), and reported as a table, JSON or a page (`report`, `page`).

No server and no catalog is used. A line that cannot be parsed is counted and reported, never fatal. A simulation runs in one
thread.
"""
