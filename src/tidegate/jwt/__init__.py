"""JSON Web Tokens of other issuers: verified with the issuer's public keys, remembered until they expire.

On failure: while the issuer's keys cannot be fetched, the last ones stay in use; without any, tokens get 503. Concurrency: one
event loop; keys are fetched in a thread. PyJWT is loaded only where a policy has `[jwt]`: `pip install "tidegate[jwt]"`.
"""
