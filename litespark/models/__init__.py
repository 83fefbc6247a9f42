"""The model: megatron-core's GPT whose slots a spec provider (backend) fills."""
