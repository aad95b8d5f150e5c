"""Measurements, as ratios within one run on one machine; never part of the tests."""

import sys

SMALL = "--small" in sys.argv
"""Whether to show only that it works: ratios say nothing then."""
