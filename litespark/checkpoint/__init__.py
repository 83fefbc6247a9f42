"""States on disk: a folder a step, complete or absent, readable at any layout.

checkpoints/
  latest                    name of the newest complete checkpoint
  step_000000100/
    run_state.json          step, samples consumed, model shape, layout, versions
    config.yaml             the configuration it was trained with
    state/                  model and optimizer, megatron-core's torch_dist format
"""
