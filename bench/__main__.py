"""``python -m bench [NAME ...]``: every comparison that needs no GPU, or those named."""

import sys
from importlib import import_module

from ldm.quiet import quieten

NAMES = ("trainer", "network", "generation", "data")
ON_GPU = ("sd",)

quieten()
for name in [one for one in sys.argv[1:] if one != "--small"] or NAMES:
    if name not in NAMES + ON_GPU:
        sys.exit(f"bench: no comparison {name!r}; there are {', '.join(NAMES + ON_GPU)}")
    import_module(f"bench.{name}").main()
