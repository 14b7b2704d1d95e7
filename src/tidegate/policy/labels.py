"""Names of API keys and tokens, which people read in lists and in the audit log: each looks like what it is, and like no other.

Source of the invisible characters: Unicode 15.1, property Default_Ignorable_Code_Point (DerivedCoreProperties.txt).
"""

from __future__ import annotations

import re
import unicodedata
from typing import Final

from tidegate.errors import BadRequest

SETTINGS_ACTOR: Final = "settings"
"""The audit log's name for whoever brings the token of the settings."""
CLI_ACTOR: Final = "cli:"
"""What its names for users of the command line begin with."""

_REFUSED: Final = re.compile(
    "["
    "\x00-\x1f\x7f-\x9f"  # control characters
    "\u2028\u2029"  # ends of lines and paragraphs
    "\ud800-\udfff"  # halves of characters, which no database keeps
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0"
    "\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"  # invisible, or turns the text around
    "\u2800"  # a braille cell without dots
    "]"
)
# Letters of other scripts that look like those of the actors' names.
_LOOKALIKES: Final = str.maketrans("ѕеіӏсꜱɩιϲ꞉∶ː", "seilcsiic:::")


def label_fault(text: str) -> str | None:
    """What keeps a text from being a name.

    Returns:
        The fault and its remedy; None for a name.
    """
    found = _REFUSED.search(text)
    if found is not None:
        return f"has the character U+{ord(found[0]):04X} at place {found.start() + 1}, which does not show: leave it out"
    return None


def require_label(text: str, field: str, *, actor_like: bool = False) -> None:
    """Refuse a name that does not show what it is.

    Args:
        text: the name; may be empty.
        field: where it came, for the error.
        actor_like: whether the audit log will name an actor so.

    Raises:
        BadRequest: naming the field, what is wrong, and the remedy.
    """
    fault = label_fault(text)
    if fault is None and text != text.strip():
        fault = "begins or ends with white space: leave it out"
    if fault is None and (actor_like or text) and _imitates(text):
        fault = f"{text[:60]!r} is how the audit log names the settings' token or a user of the command line: take another"
    if fault is None and actor_like and not text:
        fault = "is empty: say who will use the token"
    if fault is not None:
        raise BadRequest(f"{field} {fault}", field=field)


def _imitates(text: str) -> bool:
    plain = re.sub(r"\s+", "", unicodedata.normalize("NFKC", text).casefold().translate(_LOOKALIKES))
    return plain == SETTINGS_ACTOR or plain.startswith(CLI_ACTOR)
