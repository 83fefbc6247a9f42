"""Checks that take minutes or much disk, each a command, with their results beside them."""
