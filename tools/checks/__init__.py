"""Checks that are too long for CI: commands, run by hand, whose results are kept."""
