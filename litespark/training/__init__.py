"""The run: set-up in a fixed order, one optimizer step, the loop, and hooks for all the rest."""
