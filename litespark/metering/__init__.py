"""What a run costs: FLOPs and MFU, energy, memory, and the report that shows them."""
