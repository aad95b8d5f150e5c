"""Lists of (URL, caption) to verified, deduplicated shards of pictures.

``stage`` is the way in; the other files are its parts, in order: ``rows`` (with ``captions`` and
``ratings``), ``listed`` (with ``scratch``), ``store`` (with ``basis``), ``fetch`` (with
``download``, ``resizer``, ``pictures`` and ``buckets`` in the processes that it starts),
``results``, ``reasons``, ``repack`` (with ``blocklist``, ``duplicates``, ``perceptual`` and
``cuts``), ``report``, ``card`` (with ``histogram`` and ``markdown``).
"""
