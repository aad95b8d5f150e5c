"""``python -m bench [NAME ...]``: every comparison, or those named."""

import sys
from importlib import import_module

from ldm.quiet import quieten

NAMES = ("trainer", "network", "generation", "data")

quieten()
for name in [one for one in sys.argv[1:] if one != "--small"] or NAMES:
    if name not in NAMES:
        sys.exit(f"bench: no comparison {name!r}; there are {', '.join(NAMES)}")
    import_module(f"bench.{name}").main()
