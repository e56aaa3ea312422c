#!/usr/bin/env bash
# FLUX.1-dev ControlNet on one Ascend device. Not yet tested on Ascend.
#
#   DATA=fusing/fill50k flux_controlnet/launch/train_1_device.sh [more flags of the script]
#
# DATA is a hub id or a local directory; MODEL (a directory or hub id), OUT and DEVICE_ID can be set, too. The device
# holds the frozen transformer, 22.2 GB in bf16; the ControlNet with 4 + 0 blocks, 1.44 billion parameters, 5.4 GB in
# float32, and three times that for gradients and Adam's moments; and the activations that --gradient_checkpointing
# keeps: 49.4 GB in total by the plan (--dry_run).
set -euo pipefail
cd "$(dirname "$0")/../.."
export DEVICE_ID="${DEVICE_ID:-0}"

# train_devices.sh sets LAUNCHER to msrun.
read -ra launcher <<< "${LAUNCHER:-python}"
exec "${launcher[@]}" flux_controlnet/train_controlnet_flux.py \
    --pretrained_model_name_or_path "${MODEL:-black-forest-labs/FLUX.1-dev}" \
    --dataset_name "${DATA:?a dataset with image, conditioning_image and text}" \
    --output_dir "${OUT:-out/flux-controlnet}" \
    --num_double_layers 4 \
    --num_single_layers 0 \
    --mixed_precision bf16 \
    --resolution 512 \
    --cache_latents \
    --train_batch_size 1 \
    --gradient_accumulation_steps 4 \
    --gradient_checkpointing \
    --learning_rate 1e-5 \
    --max_train_steps 15000 \
    --checkpointing_steps 500 \
    --checkpoints_total_limit 3 \
    --seed 0 \
    "$@"
