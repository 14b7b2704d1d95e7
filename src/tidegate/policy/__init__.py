"""The policy: limits, rules, tiers, API keys; how a request finds its rule; and the policy file that says all this.

`model` has the records, `limits` what a limit is, `matching` finds the rule of a request, `paths` its canonical path.
`toml_reader` and `toml_writer` are the two directions of the policy file. Everything here is pure, and immutable once made: any
number of tasks and threads may use it. What is refused raises `PolicyError`, naming the value and the remedy.
"""
