#!/usr/bin/env bash
# Control-LoRA for FLUX.1-dev on one Ascend device. Not yet tested on Ascend.
#
#   DATA=fusing/fill50k examples/flux_control/launch/train_1_device.sh [more flags of the script]
#   MODEL=black-forest-labs/FLUX.1-Fill-dev DATA=images examples/flux_control/launch/train_1_device.sh --fill
#
# DATA is a hub id or a local directory; MODEL (a directory or hub id), OUT and DEVICE_ID can be set, too. The device
# holds the transformer, 22.2 GB in bf16; the LoRA of all linear layers at rank 64, 347 million parameters, 1.3 GB in
# float32, and four times that for gradients, their accumulation and Adam's moments; and the activations that
# --gradient_checkpointing keeps: 29.3 GB in total by the plan (--dry_run).
set -euo pipefail
cd "$(dirname "$0")/../../.."
export DEVICE_ID="${DEVICE_ID:-0}"

# train_devices.sh sets LAUNCHER to msrun.
read -ra launcher <<< "${LAUNCHER:-python}"
exec "${launcher[@]}" examples/flux_control/train_control_lora_flux.py \
    --pretrained_model_name_or_path "${MODEL:-black-forest-labs/FLUX.1-dev}" \
    --dataset_name "${DATA:?a dataset with image, conditioning_image and text}" \
    --output_dir "${OUT:-out/flux-control}" \
    --mixed_precision bf16 \
    --resolution 512 \
    --cache_latents \
    --train_batch_size 1 \
    --gradient_accumulation_steps 4 \
    --gradient_checkpointing \
    --lora_rank 64 \
    --learning_rate 1e-4 \
    --max_train_steps 5000 \
    --checkpointing_steps 500 \
    --checkpoints_total_limit 3 \
    --seed 0 \
    "$@"
