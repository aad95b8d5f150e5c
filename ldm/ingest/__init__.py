"""Lists of (URL, caption) to verified, deduplicated shards of pictures.

``stage`` is the way in; the other files are its parts, in order: ``rows`` (with ``captions`` and
``ratings``), ``listed`` (with ``scratch``), ``store`` (with ``basis``), both on a ``database``,
``fetch`` (in the processes that it starts ``download``, ``cluster``, ``downloader``, ``guard``,
``addresses``, ``optout``, ``resizer``, ``pictures`` and ``buckets``), ``results``, ``reasons``,
``repack`` (with ``blocklist``, ``duplicates``, ``perceptual`` and ``cuts``), ``report``, ``card``
(with ``histogram`` and ``markdown``).
"""
