"""The doors: each turns a request into a `Check` and a `Decision` into an answer, and nothing else.

`http` is the data plane (an RSGI app without a framework), `middleware` stands inside any ASGI app, `limiter` is for plain
Python code. All give the same answers; `answers` holds what they share. A door charges nothing for a request that it refuses.
"""
