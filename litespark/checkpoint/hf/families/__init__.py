"""One module a family: its table of tensors and its `config.json`; see docs/add_a_family.md."""
