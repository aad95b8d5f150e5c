"""Prefect around the stages: order, retries, reports. Nothing here computes."""

import os

from ldm.quiet import quieten

quieten()
# Of the server that a flow starts where none is set. By default 20: too few on a busy machine.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
