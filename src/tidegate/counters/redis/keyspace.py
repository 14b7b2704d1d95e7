"""Where a counter lies: the hash tag of its subject, its slot, its key.

    tg:{=i:203.0.113.7}Gk3fPq0d       a subject as it is, after =
    tg:{k0f0f0f0f0f0f0f0f}Gk3fPq0d    an API key: its id in base64, after k
    tg:{#…22 characters…}Gk3fPq0d     a subject that is long or has odd characters: a digest, after #

The last eight characters name the limit set and the shape of its states. Where a counter was reset lately, a second key with
`.reset` after its name says when.
"""

from __future__ import annotations

import binascii
import hashlib
import re
from functools import lru_cache
from typing import Final

from tidegate.counters.redis.scripts import layout
from tidegate.policy.limits import LimitSet

_PLAIN: Final = re.compile(r"[ -z|~]{1,40}", re.ASCII).fullmatch
"""Subjects that stand in keys as they are: short, printable, without braces."""


def hash_tag(subject: str) -> bytes:
    """The hash tag of a subject: itself where it is short and plain, a key's id in base64, else a digest.

    No two subjects share one: `k` + 16 characters are ids alone (a plain subject has `=` before it), `#` + 22 are digests.
    """
    if len(subject) == 26 and subject.startswith("k:") and (tag := _key_tag(subject)) is not None:
        return tag
    if _PLAIN(subject):
        return b"=" + subject.encode()
    digest = hashlib.blake2b(subject.encode(errors="surrogatepass"), digest_size=16).digest()
    return b"#" + binascii.b2a_base64(digest, newline=False)


@lru_cache(maxsize=16_384)
def _key_tag(subject: str) -> bytes | None:
    """The tag of a key's id; None for a subject that only looks like one: it is plain."""
    try:
        key_id = binascii.unhexlify(subject[2:])
    except ValueError:
        return None
    return b"k" + binascii.b2a_base64(key_id, newline=False) if key_id.hex() == subject[2:] else None


def slot_of(subject: str) -> int:
    """The slot of a cluster in which a subject's counters lie.

    Args:
        subject: as in a `Charge`.

    Returns:
        0 to 16383.
    """
    return slot_of_tag(hash_tag(subject))


def slot_of_tag(tag: bytes) -> int:
    """The slot of a hash tag.

    Returns:
        0 to 16383: CRC16 as the cluster specification has it.
    """
    return binascii.crc_hqx(tag, 0) & 16_383


def key_of(limits: LimitSet, subject: str) -> bytes:
    """The key of a counter.

    Returns:
        `tg:{tag}name`.
    """
    return b"tg:{%b}%b" % (hash_tag(subject), name_of(limits))


def reset_key_of(limits: LimitSet, subject: str) -> bytes:
    """The key that says when a counter was reset, as long as leases of before may be given back.

    Returns:
        `tg:{tag}name.reset`.
    """
    return key_of(limits, subject) + b".reset"


def name_of(limits: LimitSet) -> bytes:
    """Eight characters for a limit set's name and shape. 48 bits: only the sets of one subject must differ."""
    digest = hashlib.blake2b(f"{layout(limits)}\0{limits.name}".encode(errors="surrogatepass"), digest_size=6).digest()
    return binascii.b2a_base64(digest, newline=False)
