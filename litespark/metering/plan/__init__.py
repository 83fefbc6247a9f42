"""The planner: what a run will need and yield, computed before any GPU is asked for."""
