"""img2dataset's error messages to reasons in plain words."""

from __future__ import annotations

import re

from ldm.ingest.pictures import RefusedError

_REFUSED = "refused: "
_SEPARATOR = " | "

_HTTP = re.compile(r"HTTP Error (\d{3})")
_KNOWN = (
    ("timed out", "timeout"),
    ("timeout", "timeout"),
    ("X-Robots-Tag", "not allowed by its site"),
    ("IncompleteRead", "truncated"),
    ("Name or service not known", "unreachable"),
    ("name resolution", "unreachable"),
    ("nodename nor servname", "unreachable"),
    ("No address associated", "unreachable"),
    ("Connection refused", "unreachable"),
    ("No route to host", "unreachable"),
    ("Network is unreachable", "unreachable"),
    ("Connection reset", "connection lost"),
    ("closed connection", "connection lost"),
    ("CERTIFICATE", "bad certificate"),
    ("SSL", "bad certificate"),
    ("unknown url type", "bad url"),
)
"""The first that the message contains decides."""

REMEDIES = {
    "unreachable": "check the network and that the pictures' server is up (for the embedded "
    "scenes: ingest.serve_scenes=true)",
    "connection lost": "check the pictures' server, or ask it less at once (ingest.threads)",
    "timeout": "check the network, or raise ingest.timeout_s or ingest.retries",
    "empty caption": "fill the column caption",
    "bad url": "mend the column url",
}
"""What to do when a reason is a list's commonest."""

DEFAULT_REMEDY = "mend the list, or lower ingest.min_yield"


def as_message(refusal: RefusedError) -> str:
    """A refusal as the one string that img2dataset keeps of it."""
    return f"{_REFUSED}{refusal.reason}{_SEPARATOR}{refusal.detail}"


def read_message(message: str) -> tuple[str, str]:
    """Reason and particulars behind a message of img2dataset's."""
    if message.startswith(_REFUSED):
        reason, _, detail = message.removeprefix(_REFUSED).partition(_SEPARATOR)
        return reason, detail
    if code := _HTTP.match(message):
        return f"http {code[1]}", message.partition(": ")[2]
    for words, reason in _KNOWN:
        if words in message:
            return reason, message.removeprefix("<urlopen error ").removesuffix(">")
    return "download failed", message
