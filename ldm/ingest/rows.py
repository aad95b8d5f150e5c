"""Rows of the lists, and which of them may be worth a download."""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

import idna

from ldm.config import Ingest
from ldm.errors import UserError
from ldm.ingest.captions import cleaned
from ldm.ingest.ratings import RATINGS, check_ratings
from ldm.ingest.reasons import RefusedError

COLUMNS = ("url", "caption")
LONGEST_CELL = 2**24
"""In characters. Lists made from web pages have pictures themselves in the column of their URLs,
as ``data:``; csv's own limit of 2**17 would refuse the list for the sake of one."""
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Row:
    """One line of a list; ``number`` counts from 0, the header left out."""

    split: str
    number: int
    url: str
    caption: str
    rated: Mapping[str, str] = field(default_factory=dict)
    """The filled cells of the optional columns, :data:`ldm.ingest.ratings.RATINGS`."""
    sha256: str = ""
    """The optional column of that name: what the file behind the URL must be, or anything."""

    @cached_property
    def plain_url(self) -> str | None:
        """The URL in ASCII: see :func:`ascii_url`."""
        return ascii_url(self.url)

    @cached_property
    def key(self) -> str:
        """The name of the row's sample: see :func:`key_of`."""
        return _key(self.url, self.plain_url)


@dataclass(frozen=True)
class Skip:
    """A row that does not become a sample, and why: ``reason`` in plain words, then particulars."""

    row: Row
    reason: str
    detail: str = ""


def read_list(path: Path, split: str, max_caption: int) -> Iterator[Row]:
    """The rows of a CSV file with the columns ``url`` and ``caption``, and optional ones.

    Read as they are asked for. Captions come :func:`cleaned`. Columns of other names are left
    alone.

    Raises :class:`UserError` when the file is missing, not UTF-8, not CSV, lacks a column or has
    no rows.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: no such list; run `ldm scenes` for the embedded lists or put your own there"
        )
    row = None
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, strict=True)
            _expect_columns(path, table.fieldnames or ())
            for number, line in enumerate(_lines(table)):
                row = _row(split, number, line, max_caption)
                yield row
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error}); save it as UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{path}: {_place(table)}: is not CSV ({error}); mend that row") from error
    if row is None:
        raise UserError(f"{path}: has no rows; add lines of url,caption")


def _lines(table: csv.DictReader[str]) -> Iterator[dict[str, str | None]]:
    """Its rows, with cells of up to ``LONGEST_CELL``; that limit is one of the whole process."""
    while True:
        before = csv.field_size_limit(LONGEST_CELL)
        try:
            line = next(table, None)
        finally:
            csv.field_size_limit(before)
        if line is None:
            return
        yield line


def _place(table: csv.DictReader[str]) -> str:
    """The lines of the row that is being read; a quote may be left open for many."""
    first, last = table.line_num + 1, table.reader.line_num
    return f"line {last}" if first >= last else f"lines {first} to {last}"


def _expect_columns(path: Path, columns: Sequence[str]) -> None:
    for column in COLUMNS:
        if column not in columns:
            found = ", ".join(columns) or "nothing"
            raise UserError(
                f"{path}: has no column {column!r}; its first line must name the columns "
                f"url and caption (names {found})"
            )


def _row(split: str, number: int, line: Mapping[str, str | None], max_caption: int) -> Row:
    """Cells are None where a line is too short."""
    cells = {name: cleaned(line.get(name) or "", max_caption) for name in ("caption", *RATINGS)}
    caption = cells.pop("caption")
    rated = {name: cell for name, cell in cells.items() if cell}
    sha256 = (line.get("sha256") or "").strip().lower()
    return Row(split, number, (line["url"] or "").strip(), caption, rated, sha256)


def check(row: Row, config: Ingest) -> None:
    """Raise :class:`RefusedError` for a row that need not be asked for, whatever others there are.

    It lacks a caption, a URL or a score, is outside the limits, or has a column that is none.
    """
    if not row.caption:
        raise RefusedError("empty caption")
    if row.plain_url is None:
        raise RefusedError("bad url", "must be http://HOST/... or https://HOST/...")
    if row.sha256 and not SHA256.fullmatch(row.sha256):
        raise RefusedError("bad sha256", f"{row.sha256[:80]!r} is not 64 hexadecimal digits")
    check_ratings(row.rated, config)


def key_of(url: str) -> str:
    """The name of a URL's sample: half of the sha256 of its ASCII form. UserError if it has none.

    A function of the URL alone, so that a sample keeps it whatever happens to other rows.
    """
    return _key(url, ascii_url(url))


def _key(url: str, plain: str | None) -> str:
    if plain is None:
        raise UserError(f"{url[:200]!r}: is no URL; write http://HOST/... or https://HOST/...")
    return hashlib.sha256(plain.encode()).hexdigest()[:32]


def ascii_url(url: str) -> str | None:
    """The URL in ASCII: the host in IDNA 2008, as browsers have it, and the rest percent-encoded.

    None if it is not http(s), or names a host that there cannot be.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        if parts.scheme not in ("http", "https") or not host or "@" in parts.netloc:
            return None
        host = host if ":" not in host else f"[{host}]"
        place = host if host.isascii() else idna.encode(host, uts46=True).decode()
        path, query = map(_percent_encoded, (parts.path, parts.query))
    except ValueError:  # UnicodeError among them.
        return None
    place += "" if port is None else f":{port}"
    return urlunsplit((parts.scheme, place, path, query, ""))


def _percent_encoded(part: str) -> str:
    return quote(part, safe="/%:=&?~+!$,;'@()*[]-._")
