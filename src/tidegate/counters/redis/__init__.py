"""Counters on Redis: `store` is the port, over one `connection` a shard; `topology` knows which; `scripts` what Redis runs;
`error_replies` what to do where it does not.
"""
