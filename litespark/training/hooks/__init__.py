"""What happens around steps: one feature, one file."""
