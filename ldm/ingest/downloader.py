"""img2dataset's downloader with a guarded fetch in it.

Imports img2dataset, so only the processes that download import this.
"""

from __future__ import annotations

import io
from typing import Any

from img2dataset import downloader

from ldm.ingest.guard import Guard
from ldm.ingest.reasons import RefusedError, as_message


class GuardedDownloader(downloader.Downloader):
    """Goes to worker processes with its rules, and there fetches by them alone."""

    def __init__(self, *arguments: Any, guard: Guard, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.guard = guard

    def __call__(self, row: Any) -> Any:
        """Download a shard."""
        downloader.download_image_with_retry = self._fetch
        return super().__call__(row)

    def _fetch(self, row: tuple[int, str], **_: Any) -> tuple[int, io.BytesIO | None, str | None]:
        key, url = row
        try:
            return key, io.BytesIO(self.guard.download(url)), None
        except RefusedError as refusal:
            return key, None, as_message(refusal)
        except Exception as error:  # It would end a thread of img2dataset's, which waits for ever.
            return key, None, repr(error)[:300]
