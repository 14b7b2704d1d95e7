"""Offline tools: `simulate` replays access logs, `plan` estimates a fleet. The server never imports them."""
