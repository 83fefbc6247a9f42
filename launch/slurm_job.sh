# shellcheck shell=bash
# The body of slurm.sbatch and hyperpod.sbatch, which source it with the run's arguments.  It runs
# once, on the job's first node.  `launch` is this folder; `srun_options` may hold more for srun.
launch=${launch:?}
# shellcheck source=launch/env.sh
. "$launch/env.sh"
# shellcheck source=launch/gpus.sh
. "$launch/gpus.sh"

fail() {
    echo "launch: error: $1" >&2
    exit 2
}

[ $# -gt 0 ] || fail "CONFIG is missing: sbatch ... ${launch}/slurm.sbatch CONFIG [section.key=value ...]"
case "$1" in -*) fail "CONFIG comes first, and not $1; sbatch's options come before the script" ;; esac
restarts=${LITESPARK_MAX_RESTARTS:-0}
[[ $restarts =~ ^[0-9]+$ ]] || fail "LITESPARK_MAX_RESTARTS=$restarts is no number"
gpus=$(count_gpus)
# --ntasks-per-node, else a task for each GPU.
tasks=${SLURM_NTASKS_PER_NODE:-$((gpus > 0 ? gpus : 1))}
nodes=${SLURM_JOB_NUM_NODES:?}

srun_options+=(--nodes="$nodes" --ntasks="$((nodes * tasks))" --ntasks-per-node="$tasks")
# When one task has ended, the others get a minute to say what they saw of it.
srun_options+=(--kill-on-bad-exit=0 --wait=60)
if [ -n "${LITESPARK_CONTAINER:-}" ]; then
    srun_options+=(--container-image="$LITESPARK_CONTAINER" --container-workdir="$PWD")
    mounts="$PWD:$PWD${LITESPARK_CONTAINER_MOUNTS:+,$LITESPARK_CONTAINER_MOUNTS}"
    srun_options+=(--container-mounts="$mounts")
fi

# srun passes a signal on to all tasks, which finish the step, save and end with exit code 3.
time_is_short=
interrupted=
trap 'time_is_short=1; interrupted=1; kill -USR1 "$step" 2> /dev/null || true' USR1
trap 'interrupted=1; kill -TERM "$step" 2> /dev/null || true' TERM

attempt=0
while :; do
    srun "${srun_options[@]}" bash "$launch/slurm_task.sh" "$PYTHON" -m litespark train "$@" &
    step=$!
    while :; do # a wait that a signal has cut short is waited for again
        interrupted=
        code=0
        wait "$step" || code=$?
        [ -n "$interrupted" ] || break
    done
    case $code in
        0 | 2 | 3 | 4) break ;; # done; a mistake; saved; a guard
    esac
    [ -z "$time_is_short" ] && [ "$attempt" -lt "$restarts" ] || break
    attempt=$((attempt + 1))
    echo "launch: exit code $code; restart $attempt of $restarts" >&2
done

# Slurm puts a preempted job back into the queue only when it has to kill it: not one that has saved
# and ended within its grace time.  A job that `scancel` ends stays away.
is_preempted() {
    scontrol --oneliner show job "$SLURM_JOB_ID" | grep -Eq 'PreemptTime=[0-9]'
}
if [ "$code" -eq 3 ] && { [ -n "$time_is_short" ] || is_preempted; }; then
    echo "launch: the state is saved; job $SLURM_JOB_ID goes back into the queue" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
