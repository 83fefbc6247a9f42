#!/usr/bin/env bash
# What srun starts for each process: tells it its rank in torchrun's words, and becomes the command.
#
#   srun ... bash launch/slurm_task.sh COMMAND ARGUMENT ...
set -euo pipefail
export RANK="${SLURM_PROCID:?is not set: start this with srun}" LOCAL_RANK="$SLURM_LOCALID"
export WORLD_SIZE="$SLURM_NTASKS" LOCAL_WORLD_SIZE="$LITESPARK_TASKS_PER_NODE"
# Asked for here and not once for the job: HyperPod starts the step again on other nodes.
first=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR="${MASTER_ADDR:-$first}"
exec "$@"
