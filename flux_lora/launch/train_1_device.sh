#!/usr/bin/env bash
# FLUX.1-dev DreamBooth LoRA on one Ascend device. Not yet tested on Ascend.
#
#   PHOTOS=photos PROMPT="a photo of sks dog" flux_lora/launch/train_1_device.sh [more flags of the script]
#
# MODEL (a directory or hub id), OUT and DEVICE_ID can be set, too. The encoders run in a process that ends before the
# transformer loads. The device holds its 22.2 GB of bf16 weights, the LoRA, and the activations that
# --gradient_checkpointing keeps: 23.2 GB in total by the plan (--dry_run).
set -euo pipefail
cd "$(dirname "$0")/../.."
export DEVICE_ID="${DEVICE_ID:-0}"

# train_devices.sh sets LAUNCHER to msrun.
read -ra launcher <<< "${LAUNCHER:-python}"
exec "${launcher[@]}" flux_lora/train_dreambooth_lora_flux.py \
    --pretrained_model_name_or_path "${MODEL:-black-forest-labs/FLUX.1-dev}" \
    --instance_data_dir "${PHOTOS:?the directory with 5 to 20 images}" \
    --instance_prompt "${PROMPT:?the prompt, with a rare word for the subject}" \
    --output_dir "${OUT:-out/flux-lora}" \
    --mixed_precision bf16 \
    --resolution 512 \
    --cache_latents \
    --train_batch_size 1 \
    --gradient_accumulation_steps 4 \
    --gradient_checkpointing \
    --lora_rank 16 \
    --learning_rate 1e-4 \
    --max_train_steps 500 \
    --checkpointing_steps 100 \
    --validation_prompt "$PROMPT" \
    --seed 0 \
    "$@"
