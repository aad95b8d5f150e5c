"""The embedded pipeline ``tiny``; see its README.md."""
