"""Violations: how many checks of each subject were blocked, per rule and minute.

`recorder` counts in bounded memory (`space_saving`) and writes every few seconds; `storage` executes the SQL; `queries` reads
pages and totals. While the database fails, counts are buffered in bounded memory; dropped counts are counted.
"""
