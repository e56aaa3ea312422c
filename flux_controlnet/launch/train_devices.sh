#!/usr/bin/env bash
# ControlNet for FLUX.1-dev, on several Ascend devices of one machine or of several. Not run by us on Ascend yet.
#
#   DEVICES=8 DATA=fusing/fill50k flux_controlnet/launch/train_devices.sh [more flags of the script]
#   DEVICES=8 NODES=4 NODE_RANK=k MASTER=10.0.0.1 ... on machine k of 4, of which number 0 has that address
#
# DEVICES are those of this machine (2, 8 ...). OUT must be on a file system that all machines share. PORT (8118) and the port after it must
# be free on MASTER. BIND=False leaves the processes on any core. Ctrl-C saves a checkpoint. docs/devices.md says how the work is shared.
#
# Memory of a device, GB of 2^30 bytes by the plan (--dry_run): the frozen base 22.2 in bf16, the ControlNet's 1.44 billion float32 parameters
# 5.4 and their gradients 5.4, twice that with accumulation; of AdamW's 10.7 of state each of 8 devices has 1.3 by --zero_stage 1, each of 2
# has 5.4. With what --gradient_checkpointing leaves 44.4 on each of 2, 40.4 on each of 8.
set -euo pipefail
DEVICES="${DEVICES:-8}" NODES="${NODES:-1}" OUT="${OUT:-out/flux-controlnet}"

LAUNCHER="msrun --worker_num=$((DEVICES * NODES)) --local_worker_num=$DEVICES --node_rank=${NODE_RANK:-0}"
LAUNCHER+=" --master_addr=${MASTER:-127.0.0.1} --master_port=${PORT:-8118} --cluster_time_out=300"
LAUNCHER+=" --join=True --bind_core=${BIND:-True} --log_dir=$OUT/workers"
export LAUNCHER OUT

# In a session of its own, where Ctrl-C does not reach it: msrun would kill the workers. One that gets SIGTERM makes all of them save and stop.
setsid "$(dirname "$0")/train_1_device.sh" --distributed --zero_stage 1 "$@" &
job=$!
trap 'kill -TERM "$(pgrep -P $job -f -- --distributed | tail -1)"' INT TERM
code=0
wait $job || code=$?
while kill -0 $job 2> /dev/null; do # the signal ended the wait, the job goes on to its checkpoint
    code=0
    wait $job || code=$?
done
exit $code
