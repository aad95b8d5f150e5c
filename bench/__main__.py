"""``python -m bench [NAME ...]``: every comparison, or those named."""

import sys
from importlib import import_module

NAMES = ("trainer", "network", "generation")

for name in sys.argv[1:] or NAMES:
    if name not in NAMES:
        sys.exit(f"bench: no comparison {name!r}; there are {', '.join(NAMES)}")
    import_module(f"bench.{name}").main()
