"""Lists of (URL, caption) to verified, deduplicated shards of pictures.

``stage`` is the way in; the other files are its parts, in order: ``rows`` (with ``captions`` and
``ratings``), ``fetch`` (with ``download``, ``resizer`` and ``pictures`` in the processes that it
starts), ``reasons``, ``repack`` (with ``blocklist``, ``duplicates`` and ``perceptual``),
``report``, ``card`` (with ``histogram`` and ``markdown``).
"""
