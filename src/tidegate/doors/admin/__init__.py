"""The control plane: HTTP routes for operators, on a separate listener.

`guard` is the middleware in front of all routes: it authenticates, limits requests, and bounds bodies. Each other module has the
routes of one resource; `app` combines them. An unhandled exception is logged and answered with 500 in the usual format; it never
affects a check. Any number of requests may run concurrently; the catalog serializes changes.
"""
