#!/usr/bin/env bash
# What srun starts for each process: tells it its rank in torchrun's words, and becomes the command.
#
#   srun ... bash launch/slurm_task.sh COMMAND ARGUMENT ...
set -euo pipefail
export RANK="${SLURM_PROCID:?is not set: start this with srun}" LOCAL_RANK="$SLURM_LOCALID"
# Tasks of the nodes: "8(x2)"; the same on each.
export WORLD_SIZE="$SLURM_NTASKS" LOCAL_WORLD_SIZE="${SLURM_STEP_TASKS_PER_NODE%%(*}"
# A port that another job on the same nodes will hardly have.
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"
# Asked for here and not once for the job: HyperPod starts the step again on other nodes.
first=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR="${MASTER_ADDR:-$first}"
exec "$@"
