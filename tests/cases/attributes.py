"""A policy whose tiers and subjects come from attributes of the caller."""

from __future__ import annotations

from typing import Final

POLICY: Final = """
[attributes]
user = "header:X-User-Id"
plan = "header:X-Plan"
team = "jwt:team"
[jwt]
jwks = "https://issuer.example/jwks.json"
audience = ["api"]
[callers]
tier_from = "plan"
default_tier = "public"
[[tiers]]
name = "public"
  [[tiers.rules]]
  endpoint = "/api/*"
  limits = ["1/minute"]
[[tiers]]
name = "pro"
  [[tiers.rules]]
  endpoint = "/api/*"
  subject = "user"
  limits = ["9/minute"]
  on_missing = "deny"
  [[tiers.rules]]
  endpoint = "/api/*"
  methods = ["POST"]
  subject = ["org", "user"]
  match = { region = "eu-*", plan = "pro" }
  limits = ["5/minute"]
  on_missing = "skip"
  mode = "shadow"
  [[tiers.rules]]
  match = { service = "pay", user = "*" }
  limits = ["2/hour"]
[[namespaces]]
name = "emails"
limits = ["10/minute"]
  [[namespaces.overrides]]
  subject = "vip-*"
  limits = ["20/minute", "50/hour"]
"""
