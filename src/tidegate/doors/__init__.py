"""The doors: each turns a request into a `Check` and a `Decision` into an answer, and nothing else.

`http` is the data plane (an RSGI app without a framework), `grpc` is for Envoy, `middleware` runs inside any ASGI app,
`limiter` is for plain Python code. All give the same answers; `answers` holds what they share. `admin` decides nothing: it is the
control plane, where operators change what is decided by. A door charges nothing for a request that it refuses.
"""
