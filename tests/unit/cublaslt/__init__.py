"""The binding of cuBLASLt without a GPU."""
