#!/usr/bin/env bash
# Trains on several machines without a scheduler.
#
# By hand, the same command typed on every node:
#   launch/torchrun_multinode.sh --nnodes N --rdzv-endpoint HOST[:PORT] CONFIG [section.key=value ...]
# From one of them, over ssh without passwords (the repository and the environment at the same paths):
#   launch/torchrun_multinode.sh --hosts HOST,HOST,... [--nnodes MIN:MAX] CONFIG [section.key=value ...]
#
#   --nnodes N|MIN:MAX      nodes that run together; MIN:MAX goes on with fewer (default: all hosts)
#   --rdzv-endpoint HOST    where all meet (default with --hosts: the first of them)
#   --node-rank R           static numbering of the nodes, 0 to N-1 (default: by their names)
#   --nproc N               processes a node (default: its GPUs, or 1)
#   --max-restarts M        starts again, from the newest checkpoint, after a lost node or a fault
# and what else `litespark train --help` says; all of it goes there.  $SSH replaces ssh.
#
# It is torchrun's agent and c10d rendezvous that start the processes, inside `litespark train`.
# Plain `torchrun ... -m litespark train CONFIG` works as well.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() {
    echo "launch: error: $1" >&2
    exit 2
}

hosts=''
tied=''
if [ "${1:-}" = --tied-to-stdin ]; then # how it starts itself over ssh
    tied=1
    shift
fi
if [ "${1:-}" = --hosts ]; then
    [ $# -ge 2 ] || fail "--hosts needs HOST,HOST,..."
    hosts=$2
    shift 2
fi
case " $* " in
    *" --hosts "*) fail "--hosts comes before the other arguments" ;;
esac

if [ -z "$hosts" ]; then
    # shellcheck source=launch/env.sh
    . "$here/env.sh"
    # shellcheck source=launch/gpus.sh
    . "$here/gpus.sh"
    [ $# -gt 0 ] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2; }
    case " $* " in
        *" --nnodes "* | *" --nnodes="*) ;;
        *) fail "--nnodes is missing: how many nodes run together? (--hosts a,b starts them over ssh)" ;;
    esac
    processes=$(count_gpus)
    set -- "$PYTHON" -m litespark train --nproc "$((processes > 0 ? processes : 1))" "$@"
    [ -n "$tied" ] || exec "$@"
    # The other end of ssh holds our standard input open for as long as the run shall last.
    "$@" < /dev/null &
    run=$!
    { cat > /dev/null; kill -TERM "$run" 2> /dev/null || true; } <&0 &
    watch=$!
    code=0
    wait "$run" || code=$?
    kill "$watch" 2> /dev/null || true
    exit "$code"
fi

IFS=, read -r -a names <<< "$hosts"
[ ${#names[@]} -gt 0 ] || fail "--hosts names no host"
duplicate=$(printf '%s\n' "${names[@]}" | sort | uniq -d)
[ -z "$duplicate" ] || fail "--hosts names $duplicate twice"
options=()
case " $* " in
    *" --nnodes "* | *" --nnodes="*) ;;
    *) options+=(--nnodes "${#names[@]}") ;;
esac
case " $* " in
    *" --rdzv-endpoint "* | *" --rdzv-endpoint="*) ;;
    *) options+=(--rdzv-endpoint "${names[0]}") ;;
esac

folder=$(mktemp -d)
mkfifo "$folder/hold"
exec 9<> "$folder/hold" # open for as long as the run shall last
# Closed, the remote ends read the end of the file, save and stop.
trap 'exec 9>&-' INT TERM HUP USR1
trap 'rm -rf "$folder"' EXIT

on_host() { # HOST: runs there, again when the host was lost and the others go on
    local words code
    printf -v words '%q ' env "PYTHON=${PYTHON:-python}" "$here/torchrun_multinode.sh" --tied-to-stdin "${@:2}"
    while :; do
        code=0
        ${SSH:-ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10 -o ServerAliveCountMax=3} \
            "$1" "cd $(printf %q "$PWD") && exec $words" < "$folder/hold" || code=$?
        [ "$code" -ne 0 ] || touch "$folder/done"
        # 255 is ssh's own: no connection, or a lost one.
        if [ "$code" -ne 255 ] || [ -z "$elastic" ] || [ -e "$folder/done" ]; then
            [ "$code" -ne 255 ] || echo "launch: error: $1 cannot be reached by ssh, or was lost" >&2
            return "$code"
        fi
        echo "launch: $1 cannot be reached by ssh; trying again in 10 s" >&2
        sleep 10
    done
}

elastic=''
case "$*" in *--nnodes[=\ ]*:*) elastic=1 ;; esac
pids=()
for name in "${names[@]}"; do
    on_host "$name" "${options[@]}" "$@" 9>&- &
    pids+=($!)
done
worst=0
for pid in "${pids[@]}"; do
    while :; do
        code=0
        wait "$pid" || code=$?
        # A wait that a signal has cut short is waited for again.
        kill -0 "$pid" 2> /dev/null || break
    done
    [ "$worst" -ne 0 ] || worst=$code
done
exit "$worst"
