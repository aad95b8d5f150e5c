"""The embedded world: captioned scenes, drawn, described, served and read back.

Everything the demo, the tests and the embedded ``tiny`` model need in place of the open web.
"""
