"""Entry of ``accelerate launch -m ldm.encode``: one process of the stage."""

from __future__ import annotations

from ldm.importing import quick_imports

if __name__ == "__main__":
    with quick_imports():
        from ldm.encode.stage import main
    main()
