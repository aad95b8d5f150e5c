"""``python -m bench [NAME ...]``: all that need neither a GPU nor half an hour, or those named."""

import sys
from importlib import import_module

from ldm.quiet import quieten

NAMES = ("trainer", "network", "generation", "data")
ELSE = ("start", "launched", "sd", "seeds")

quieten()
for name in [one for one in sys.argv[1:] if one != "--small"] or NAMES:
    if name not in NAMES + ELSE:
        sys.exit(f"bench: no comparison {name!r}; there are {', '.join(NAMES + ELSE)}")
    import_module(f"bench.{name}").main()
