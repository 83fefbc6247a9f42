"""States on disk: a folder a step, whole or absent, readable at any layout.

checkpoints/
  latest                    name of the newest checkpoint
  step_000000100/
    complete.json           every other file with its size and XXH3-128; written last
    run_state.json          step, updates, samples consumed, model shape, layout, FP8 scales,
                            versions
    config.yaml             the configuration it was trained with
    random/rank_000000.json the random generators of one rank; for a resume at the same layout
    state/                  model and optimizer, torch's distributed checkpoint format
      __0_0.distcp ...      tensors that rank 0 wrote, in files written side by side
      .metadata             which part of which tensor lies where
      common.pt, metadata.json
  .step_000000200.writing/  a save in flight, or what a kill has left of one
  rolled_back_step_.../     checkpoints of later steps than the one a run was resumed from

A save writes all of `state/` and `random/` from all ranks, forces it to the disk, then the rest,
then `complete.json`; then the folder gets its name, then `latest` moves, then older checkpoints
are pruned.  A kill between any two of these leaves every named checkpoint whole.
"""
