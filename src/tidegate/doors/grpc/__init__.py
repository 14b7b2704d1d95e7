"""The gRPC door: Envoy's rate limit service (`envoy.service.ratelimit.v3`) and `grpc.health.v1`, in the loop of the HTTP door.

`listener` holds the seam to the HTTP/2 server, `service` turns a request into checks and decisions into an answer, `health` tells
whether this instance is to be asked. It needs the extra `tidegate[envoy]`. What an end client can cause (an odd path, an unknown
key, a message that is too large) is answered OVER_LIMIT, never by a gRPC error: those pass where Envoy is told to fail open.
"""
