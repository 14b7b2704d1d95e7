"""Offline tools of the command line: `simulate` replays access logs, `plan` sizes a fleet. The server never imports them."""
