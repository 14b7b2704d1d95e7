"""Whom limiters count, and how much: what is refused before anything is charged."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Final, TypeAlias

from tidegate.decision import MAX_COST
from tidegate.errors import BadRequest, clip
from tidegate.policy.attributes import checked_attributes
from tidegate.policy.descriptors import entries_text

LONGEST_SUBJECT: Final = 128
DIGEST: Final = "h:"
"""Before the digest that is counted in place of a long subject. A subject that begins so is counted by its digest too."""

LimitedSubject: TypeAlias = str | Mapping[str, str]
"""Whom a limiter counts: any text, or attributes, of which each combination counts for itself."""


def checked_cost(cost: object) -> int:
    """A cost that can be charged.

    Raises:
        BadRequest: if it is not a whole number from 0 to 1,000,000,000.
    """
    if type(cost) is not int or not 0 <= cost <= MAX_COST:
        raise BadRequest(f"cost {clip(cost)} must be a whole number from 0 to {MAX_COST}", field="cost")
    return cost


def fit_subject(subject: object) -> str:
    """The subject itself, or a digest where it is longer than a counter's key should be, or could be taken for a digest."""
    if isinstance(subject, Mapping) and (attributes := checked_attributes(subject)):
        text = entries_text(sorted(attributes.items()))
        # Always a digest, of a kind that no text has: a text that reads like attributes is another subject.
        return DIGEST + hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=32, person=b"attributes").hexdigest()
    if type(subject) is not str or not subject:
        raise BadRequest(f"subject {clip(subject)} must be a non-empty string such as 'user-42', or attributes", field="subject")
    if len(subject) <= LONGEST_SUBJECT and not subject.startswith(DIGEST):
        return subject
    return DIGEST + hashlib.blake2b(subject.encode(errors="surrogatepass"), digest_size=32).hexdigest()
