"""What operators do: read and change tiers, rules, API keys and tokens, import and export policy.

Every change is one transaction with its row in the audit log (`transaction`), announced to all instances. A change names the
revision that it saw, and is refused if the row has changed since. What is refused changes nothing. Doors and the command line
call the same functions; changes of several tasks wait for each other.
"""
