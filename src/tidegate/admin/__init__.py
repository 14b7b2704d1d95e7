"""Operations of the control plane: read and change tiers, rules, API keys and tokens, import and export policies.

Every change is one transaction with its row in the audit log (`transaction`), announced to all instances. A change contains
the revision that was read, and is rejected if the row has another one. A rejected change changes nothing. Routes and the command
line call the same functions; concurrent changes run one after another.
"""
