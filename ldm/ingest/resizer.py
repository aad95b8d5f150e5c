"""img2dataset's resizer behind a check of what it is given.

Imports img2dataset, so only the processes that download import this.
"""

from __future__ import annotations

import io
from typing import Any

import cv2
import numpy as np
from img2dataset.resizer import Resizer

from ldm.ingest.buckets import nearest
from ldm.ingest.pictures import Rules, diagnose, plain
from ldm.ingest.reasons import RefusedError, as_message

Resized = tuple[bytes | None, int | None, int | None, int | None, int | None, str | None]


class CheckedResizer(Resizer):
    """Refuses what is against the rules and hands on plain 8-bit RGB only.

    Where there are sizes besides the square, it crops to the picture's nearest itself.
    """

    def __init__(self, *arguments: Any, rules: Rules, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.rules = rules

    def __call__(self, img_stream: io.BytesIO, blurring_bbox_list: Any = None) -> Resized:
        """Encoded bytes, width, height, original width and height, or a message as the last."""
        content = img_stream.getvalue()
        try:
            handy = plain(content, self.rules)
        except RefusedError as refusal:
            return None, None, None, None, None, as_message(refusal)
        if len(self.rules.sizes) > 1:
            result = self._to_bucket(handy)
        else:
            result = super().__call__(io.BytesIO(handy), blurring_bbox_list)
        if result[-1] is not None:
            return None, None, None, None, None, as_message(diagnose(content))
        return result

    def _to_bucket(self, content: bytes) -> Resized:
        """As img2dataset's centre crop, with its interpolation; it knows squares alone."""
        cv2.setNumThreads(1)
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
        if image is None:
            return None, None, None, None, None, "does not decode"
        rows, columns = image.shape[:2]
        width, height = nearest(columns, rows, self.rules.sizes)
        scale = max(width / columns, height / rows)
        interpolation = self.downscale_interpolation if scale < 1 else self.upscale_interpolation
        covering = round(columns * scale), round(rows * scale)
        scaled = cv2.resize(image, covering, interpolation=interpolation)
        left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
        cropped = scaled[top : top + height, left : left + width]
        _, encoded = cv2.imencode(f".{self.encode_format}", cropped, self.encode_params)
        return encoded.tobytes(), width, height, columns, rows, None
