"""Modules that fill megatron-core's slots: norms and core attention of the reference backend."""
