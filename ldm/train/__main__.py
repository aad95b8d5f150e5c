"""Entry of ``accelerate launch -m ldm.train``: one process of the stage."""

from __future__ import annotations

from ldm.importing import quick_imports
from ldm.termination import end_quietly

if __name__ == "__main__":
    end_quietly()
    with quick_imports():
        from ldm.train.stage import main
    main()
