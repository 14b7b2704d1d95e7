"""Violations: who was blocked how often, by which rule, in which minute.

`recorder` counts in bounded memory (`space_saving`) and writes every few seconds; `storage` has the SQL; `queries` reads pages
and totals. When the database fails, counts wait in memory within a bound, and what is dropped is counted.
"""
