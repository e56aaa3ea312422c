#!/usr/bin/env bash
# LoRA for FLUX.1-Kontext-dev on several Ascend devices of one or several machines. Not yet tested on Ascend.
#
#   DEVICES=8 DATA=pairs examples/flux_kontext/launch/train_devices.sh [more flags of the script]
#   DEVICES=8 NODES=4 NODE_RANK=k MASTER=10.0.0.1 ... on machine k of 0 to 3; machine 0 has that address
#
# DEVICES is the number of devices of this machine. OUT must be on a file system that all machines share. PORT (8118)
# and the next port must be free on MASTER. BIND=False does not bind processes to cores. Ctrl-C saves a checkpoint.
# docs/devices.md explains data-parallel training.
#
# Memory per device by the plan (--dry_run): 24.3 GB (of 2^30 bytes), as with train_1_device.sh. Each rank has the
# whole base model, 22.2 GB in bf16, and the LoRA, whose optimizer state at rank 16 is 0.4 GB: --zero_stage 1 is not
# worth its communication.
set -euo pipefail
DEVICES="${DEVICES:-8}" NODES="${NODES:-1}" OUT="${OUT:-out/flux-kontext}"

LAUNCHER="msrun --worker_num=$((DEVICES * NODES)) --local_worker_num=$DEVICES --node_rank=${NODE_RANK:-0}"
LAUNCHER+=" --master_addr=${MASTER:-127.0.0.1} --master_port=${PORT:-8118} --cluster_time_out=300"
LAUNCHER+=" --join=True --bind_core=${BIND:-True} --log_dir=$OUT/workers"
export LAUNCHER OUT

# docs/ascend.md says why. Your own values win.
cores=$(nproc)
export HCCL_CONNECT_TIMEOUT="${HCCL_CONNECT_TIMEOUT:-1800}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > DEVICES ? cores / DEVICES : 1))}"

# In its own session, so that Ctrl-C does not reach msrun, which would kill the ranks. SIGTERM to one rank makes all
# of them save a checkpoint and stop.
setsid "$(dirname "$0")/train_1_device.sh" --distributed "$@" &
job=$!
trap 'kill -TERM "$(pgrep -P $job -f -- --distributed | tail -1)"' INT TERM
code=0
wait $job || code=$?
while kill -0 $job 2> /dev/null; do # the signal ended the wait; the job is still saving its checkpoint
    code=0
    wait $job || code=$?
done
exit $code
