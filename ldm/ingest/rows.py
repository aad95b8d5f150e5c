"""Rows of the lists, and which of them are worth a download."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

from ldm.errors import UserError
from ldm.ingest.captions import cleaned

COLUMNS = ("url", "caption")


@dataclass(frozen=True)
class Row:
    """One line of a list; ``number`` counts from 0, the header left out."""

    split: str
    number: int
    url: str
    caption: str


@dataclass(frozen=True)
class Skip:
    """A row that does not become a sample, and why: ``reason`` in plain words, then particulars."""

    row: Row
    reason: str
    detail: str = ""


def read_list(path: Path, split: str, max_caption: int) -> list[Row]:
    """Read a CSV file with the columns ``url`` and ``caption``; more columns are left alone.

    Captions come :func:`cleaned`.

    Raises :class:`UserError` when the file is missing, not UTF-8, not CSV, lacks a column or has
    no rows.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: no such list; run `ldm scenes` for the embedded lists or put your own there"
        )
    try:
        table = csv.DictReader(io.StringIO(path.read_text("utf-8-sig"), newline=""), strict=True)
        columns = table.fieldnames or ()
        for column in COLUMNS:
            if column not in columns:
                found = ", ".join(columns) or "nothing"
                raise UserError(
                    f"{path}: has no column {column!r}; its first line must name the columns "
                    f"url and caption (names {found})"
                )
        rows = [
            Row(
                split,
                number,
                (line["url"] or "").strip(),
                cleaned(line["caption"] or "", max_caption),
            )
            for number, line in enumerate(table)
        ]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error}); save it as UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{path}: is not CSV ({error}); mend that line") from error
    if not rows:
        raise UserError(f"{path}: has no rows; add lines of url,caption")
    return rows


def sort_out(rows: Iterable[Row]) -> tuple[list[Row], list[Skip]]:
    """Split one list's rows into those to download and those to skip unseen.

    Of rows with the same URL the first that has a caption stays.
    """
    wanted: list[Row] = []
    skipped: list[Skip] = []
    first: dict[str, int] = {}
    for row in rows:
        if not row.caption.strip():
            skipped.append(Skip(row, "empty caption"))
        elif ascii_url(row.url) is None:
            skipped.append(Skip(row, "bad url", "must be http://HOST/... or https://HOST/..."))
        elif row.url in first:
            skipped.append(Skip(row, "duplicate", f"same url as row {first[row.url]}"))
        else:
            first[row.url] = row.number
            wanted.append(row)
    return wanted, skipped


def ascii_url(url: str) -> str | None:
    """The URL in ASCII, host in IDNA and the rest percent-encoded; None if it is not http(s)."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        if parts.scheme not in ("http", "https") or not host or "@" in parts.netloc:
            return None
        host = host if ":" not in host else f"[{host}]"
        place = host if host.isascii() else host.encode("idna").decode()
    except ValueError:
        return None
    place += "" if port is None else f":{port}"
    path, query = (quote(part, safe="/%:=&?~+!$,;'@()*[]-._") for part in (parts.path, parts.query))
    return urlunsplit((parts.scheme, place, path, query, ""))
