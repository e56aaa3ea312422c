#!/usr/bin/env bash
# LoRA for FLUX.1-Kontext-dev on one Ascend device. Not yet tested on Ascend.
#
#   DATA=pairs examples/flux_kontext/launch/train_1_device.sh [more flags of the script]
#
# DATA is a hub id or a local directory with the columns image (the edited one), conditioning_image (its source) and
# text (the instruction); --image_column, --conditioning_image_column and --caption_column give other names. MODEL (a
# directory or hub id), OUT and DEVICE_ID can be set, too. The device holds the transformer's 22.2 GB of bf16 weights,
# the LoRA, and the activations that --gradient_checkpointing keeps, of targets and sources: 24.3 GB in total by the
# plan (--dry_run).
set -euo pipefail
cd "$(dirname "$0")/../../.."
export DEVICE_ID="${DEVICE_ID:-0}"

# train_devices.sh sets LAUNCHER to msrun.
read -ra launcher <<< "${LAUNCHER:-python}"
exec "${launcher[@]}" examples/flux_kontext/train_lora_flux_kontext.py \
    --pretrained_model_name_or_path "${MODEL:-black-forest-labs/FLUX.1-Kontext-dev}" \
    --dataset_name "${DATA:?a dataset with image, conditioning_image and text}" \
    --output_dir "${OUT:-out/flux-kontext}" \
    --mixed_precision bf16 \
    --resolution 512 \
    --cache_latents \
    --train_batch_size 1 \
    --gradient_accumulation_steps 4 \
    --gradient_checkpointing \
    --lora_rank 16 \
    --learning_rate 1e-4 \
    --max_train_steps 1000 \
    --checkpointing_steps 250 \
    --seed 0 \
    "$@"
