"""Downloads on a Ray cluster: whether Ray is there, and what its workers are given.

img2dataset hands them its downloader with each shard. The guard and the rules travel in that (see
:mod:`ldm.ingest.downloader`), and this code beside it, so that both hold there as they do here; a
worker that cannot load them fetches nothing, and the stage fails.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ldm
from ldm.config import Ingest
from ldm.errors import UserError

ADDRESS, LOCAL = "RAY_ADDRESS", "local"
"""Ray's own variable and word: where the cluster is."""
SETTINGS = {"NO_ALBUMENTATIONS_UPDATE": "1", "OMP_NUM_THREADS": "1"}


def expect_distributor(config: Ingest) -> None:
    """UserError if Ray is to hand out the downloads and is not installed.

    Asked for a Ray that is not there, img2dataset fetches nothing and ends with 0.
    """
    if config.distributor == "ray" and find_spec("ray") is None:
        raise UserError(
            "ingest.distributor ray: Ray is not installed; install it (`pip install "
            "'ray>=2.55,<3'`), or set ingest.distributor to multiprocessing"
        )


def join(processes: int) -> None:
    """Connect this process to the cluster, or to one of ``processes`` that is this machine."""
    address = os.environ.get(ADDRESS, LOCAL)
    own: dict[str, Any] = {}
    if address == LOCAL:
        # By it Ray listens on loopback alone; it was made for systems whose firewalls ask.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        own = {"num_cpus": processes, "include_dashboard": False}
    code = [str(Path(ldm.__file__).parent)]
    ray = import_module("ray")
    ray.init(address, runtime_env={"py_modules": code, "env_vars": SETTINGS}, **own)
