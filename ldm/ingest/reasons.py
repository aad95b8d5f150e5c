"""Reasons in plain words, through img2dataset's error messages and back."""

from __future__ import annotations


class RefusedError(Exception):
    """A row that will not become a sample: the reason in plain words, then particulars."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


PASSING = frozenset(
    {
        "timeout",
        "connection lost",
        "unreachable",
        "http 408",
        "http 425",
        "http 429",
        "download failed",
        "no result",
    }
)
_REFUSED = "refused: "
_SEPARATOR = " | "


REMEDIES = {
    "closed address": "name its network in ingest.allow_addresses if it is yours",
    "unreachable": "check the network and that the pictures' server is up (for the embedded "
    "scenes: ingest.serve_scenes=true)",
    "connection lost": "check the pictures' server, or ask it less at once (ingest.threads)",
    "timeout": "check the network, or raise ingest.timeout_s or ingest.retries",
    "empty caption": "fill the column caption",
    "bad url": "mend the column url",
    "bad score": "mend that column",
    "bad sha256": "mend that column",
    "changed content": "look at the URL; if what is there now is right, put its sha256 into the "
    "list's column sha256",
    "no score": "fill that column, or set its limit under ingest to null",
    "punsafe too high": "raise ingest.max_punsafe, or set it to null",
    "pwatermark too high": "raise ingest.max_pwatermark, or set it to null",
    "aesthetic too low": "lower ingest.min_aesthetic, or set it to null",
    "license not allowed": "name it in ingest.licenses, or set that to null",
    "blocked": "mend the list, or the one that ingest.blocked names",
    "near duplicate": "lower ingest.near_duplicates, or set it to null",
}
"""What to do when a reason is a list's commonest."""

DEFAULT_REMEDY = "mend the list, ask it all again (--refetch), or lower ingest.min_yield"


def may_pass(reason: str) -> bool:
    """Whether a reason may be gone at the next try."""
    return reason in PASSING or reason.startswith("http 5")


def as_message(refusal: RefusedError) -> str:
    """A refusal as the one string that img2dataset keeps of it."""
    return f"{_REFUSED}{refusal.reason}{_SEPARATOR}{refusal.detail}"


def read_message(message: str) -> tuple[str, str]:
    """Reason and particulars behind a message of img2dataset's."""
    if message.startswith(_REFUSED):
        reason, _, detail = message.removeprefix(_REFUSED).partition(_SEPARATOR)
        return reason, detail
    return "download failed", message
