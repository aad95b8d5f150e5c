"""Prefect around the stages: order, retries, reports. Nothing here computes."""

from ldm.quiet import quieten

quieten()
