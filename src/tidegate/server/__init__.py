"""A running server: settings to resources (`wiring`), one instance (`instance`), its process (`run`), several
workers (`supervisor`, `worker`), and the sockets they listen on (`addresses`, `listener`).

Resources are opened in order and closed in reverse. A resource that fails to open ends the start with a sentence that names the
setting; one that fails later degrades `/health`.
"""
