# shellcheck shell=bash
# count_gpus: how many GPUs processes started here would see.
count_gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        awk -v list="$CUDA_VISIBLE_DEVICES" 'BEGIN { print split(list, devices, ",") }'
    elif command -v nvidia-smi > /dev/null; then
        nvidia-smi --list-gpus 2> /dev/null | grep -c '^GPU' || true
    else
        echo 0
    fi
}
