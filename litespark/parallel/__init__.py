"""Which process does what: rank arithmetic, device, process groups, random numbers."""
