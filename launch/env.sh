# shellcheck shell=bash
# Environment variables of a run; every script in this folder reads this file before it starts
# processes.  A variable that you have set yourself is left as it is.
#
# It is short on purpose.  What Litespark needs it sets itself (CUDA_DEVICE_MAX_CONNECTIONS, the
# number of CPU threads, gloo's interface), and NCCL finds out about the network better than a list
# copied from another cluster: NCCL_ALGO, NCCL_PROTO, NCCL_IB_HCA, NCCL_NET_GDR_LEVEL,
# NCCL_NVLS_ENABLE, NCCL_BUFFSIZE and the like are not set.  Measure before you set one
# (`litespark doctor --distributed` prints the bandwidth).

# WARN: NCCL says why it failed, and nothing else.  Without it a failure is "unhandled system
# error".  INFO tells which network and algorithm it has chosen.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# Only when nodes have several networks and the wrong one is chosen, e.g. LITESPARK_INTERFACE=eth0.
# NCCL sets up its connections over that interface (the data goes over InfiniBand or EFA where there
# is one), gloo sends everything over it.  NCCL reads a list of prefixes: "=" makes it an exact name.
if [ -n "${LITESPARK_INTERFACE:-}" ]; then
    export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-=$LITESPARK_INTERFACE}"
    export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$LITESPARK_INTERFACE}"
fi

# Amazon's EFA (p4d, p5, p5e, p5en), where the adapter is there: see hyperpod.sbatch.
if [ -d /sys/class/infiniband ] && compgen -G '/sys/class/infiniband/*/device/driver/module/drivers/*:efa' > /dev/null; then
    # libfabric takes EFA or fails; without it a node whose EFA is broken would quietly use TCP.
    export FI_PROVIDER="${FI_PROVIDER:-efa}"
    # Huge pages are not copied at a fork, and checkpoints are written by a forked process.
    export FI_EFA_USE_HUGE_PAGE="${FI_EFA_USE_HUGE_PAGE:-0}"
fi

# The Python that has Litespark; a virtual environment's need not be activated.
PYTHON="${PYTHON:-python}"
if ! command -v "$PYTHON" > /dev/null; then
    echo "launch: error: there is no $PYTHON on $(hostname). Activate the environment that has Litespark, or set PYTHON=/path/to/python." >&2
    exit 2
fi
