"""img2dataset's resizer behind a check of what it is given.

Imports img2dataset, so only the processes that download import this.
"""

from __future__ import annotations

import io
from typing import Any

from img2dataset.resizer import Resizer

from ldm.ingest.pictures import Rules, diagnose, plain
from ldm.ingest.reasons import RefusedError, as_message

Resized = tuple[bytes | None, int | None, int | None, int | None, int | None, str | None]


class CheckedResizer(Resizer):
    """Refuses what is against the rules and hands on plain 8-bit RGB only."""

    def __init__(self, *arguments: Any, rules: Rules, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.rules = rules

    def __call__(self, img_stream: io.BytesIO, blurring_bbox_list: Any = None) -> Resized:
        """Encoded bytes, width, height, original width and height, or a message as the last."""
        content = img_stream.getvalue()
        try:
            result: Resized = super().__call__(
                io.BytesIO(plain(content, self.rules)), blurring_bbox_list
            )
        except RefusedError as refusal:
            return None, None, None, None, None, as_message(refusal)
        if result[-1] is not None:
            return None, None, None, None, None, as_message(diagnose(content))
        return result
