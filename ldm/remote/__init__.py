"""Artifacts at a URL."""
