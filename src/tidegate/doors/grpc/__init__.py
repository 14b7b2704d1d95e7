"""The gRPC door: Envoy's rate limit service (`envoy.service.ratelimit.v3`) and `grpc.health.v1`, in the loop of the HTTP door.

`listener` is the interface to the HTTP/2 server, `service` converts requests to checks and decisions to answers, and `health`
reports whether this instance accepts requests. It needs the extra `tidegate[envoy]`. Errors that an end client can cause (an
invalid path, an unknown key, a message that is too large) are answered OVER_LIMIT, never by a gRPC error: with
`failure_mode_deny: false`, Envoy would let those requests pass.
"""
