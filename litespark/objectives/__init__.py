"""What is minimised: each objective gives the forward step that megatron-core's schedules call."""
