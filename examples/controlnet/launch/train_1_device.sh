#!/usr/bin/env bash
# ControlNet for Stable Diffusion 1.5 (SDXL=1: for XL) on one Ascend device. Not yet tested on Ascend.
#
#   DATA=fusing/fill50k [SDXL=1] examples/controlnet/launch/train_1_device.sh [more flags of the script]
#
# DATA is a hub id or a local directory; MODEL (a directory or hub id), OUT and DEVICE_ID can be set, too. By the plan
# (--dry_run) these flags take 8.4 GB of the device, XL 28.5 GB; --use_8bit_adam saves 1.9 (7.0) GB.
set -euo pipefail
cd "$(dirname "$0")/../../.."
export DEVICE_ID="${DEVICE_ID:-0}"

if [ -n "${SDXL:-}" ]; then
    SCRIPT=train_controlnet_sdxl.py MODEL="${MODEL:-stabilityai/stable-diffusion-xl-base-1.0}" RESOLUTION=1024
else
    SCRIPT=train_controlnet.py MODEL="${MODEL:-stable-diffusion-v1-5/stable-diffusion-v1-5}" RESOLUTION=512
fi

# train_devices.sh sets LAUNCHER to msrun.
read -ra launcher <<< "${LAUNCHER:-python}"
exec "${launcher[@]}" "examples/controlnet/$SCRIPT" \
    --pretrained_model_name_or_path "$MODEL" \
    --dataset_name "${DATA:?a dataset with image, conditioning_image and text}" \
    --output_dir "${OUT:-out/controlnet}" \
    --mixed_precision fp16 \
    --resolution "$RESOLUTION" \
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
