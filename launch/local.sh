#!/usr/bin/env bash
# Trains on this machine: one process for each of its GPUs, or N on its CPU.
#
#   launch/local.sh CONFIG [section.key=value ...] [--nproc N] [--max-restarts M] [--dry-run]
#
# All arguments go to `litespark train` (see `litespark train --help`); --nproc is the number of
# GPUs that CUDA_VISIBLE_DEVICES and the driver show, or 1 without any, unless it is given.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/env.sh
. "$here/env.sh"
# shellcheck source=launch/gpus.sh
. "$here/gpus.sh"

processes=$(count_gpus)
exec "$PYTHON" -m litespark train --nproc "$((processes > 0 ? processes : 1))" "$@"
