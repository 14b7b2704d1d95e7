"""What would this policy have done to yesterday's traffic?

An access log is read line by line (`log_lines`; `log_formats` recognizes what `log_text` and `log_records` read), put into time
order in bounded memory (`time_order`), decided in the log's own time by the same rules and counters as live traffic (`replay`),
and reported as a table, JSON or a page (`report`, `page`).

Nothing outside is touched: no server, no catalog. A line that cannot be read is counted and shown, never fatal. One
simulation is one thread's.
"""
