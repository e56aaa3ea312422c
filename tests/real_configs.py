"""The JSON files of published pipelines: every key, with its published value.

`PIPELINES[name]` maps each file of the repository on the hub to its content. The keys of a file depend on the version
of diffusers that wrote it; keys of later versions are missing here, too. Comments mark content whose published file was
not available. Sizes are the real ones; tests/real_pipelines.py makes them small.
"""

from __future__ import annotations

SD1_LEVELS = {
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
SDXL_DOWN = ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2
SDXL_UP = ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"]


def header(cls: str, version: str, path: str | None = None) -> dict:
    """The first entries of a config.json of diffusers."""
    return {"_class_name": cls, "_diffusers_version": version, **({"_name_or_path": path} if path else {})}


def without(config: dict, *keys: str) -> dict:
    """The config without some keys."""
    return {key: value for key, value in config.items() if key not in keys}


# ---- models --------------------------------------------------------------------------------------

# Keys of all UNets and their ControlNets, of every version.
UNET_SHARED = {
    "act_fn": "silu", "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768,
    "down_block_types": SD1_LEVELS["down_block_types"], "downsample_padding": 1, "flip_sin_to_cos": True,
    "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05,
    "norm_num_groups": 32,
}  # fmt: skip
UNET_SD1 = {
    **UNET_SHARED, "center_input_sample": False, "out_channels": 4, "sample_size": 64,
    "up_block_types": SD1_LEVELS["up_block_types"],
}  # fmt: skip
UNET_SD2 = {
    **UNET_SD1, "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "dual_cross_attention": False,
    "use_linear_projection": True,
}  # fmt: skip
UNET_0_10 = {"num_class_embeds": None, "only_cross_attention": False}  # what diffusers 0.10 added
# Further keys of 0.16 and 0.19.
UNET_0_16 = {
    **UNET_0_10, "addition_embed_type": None, "addition_embed_type_num_heads": 64, "class_embed_type": None,
    "class_embeddings_concat": False, "conv_in_kernel": 3, "conv_out_kernel": 3, "cross_attention_norm": None,
    "dual_cross_attention": False, "encoder_hid_dim": None, "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn", "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": 1.0, "resnet_skip_time_act": False, "resnet_time_scale_shift": "default",
    "time_cond_proj_dim": None, "time_embedding_act_fn": None, "time_embedding_dim": None,
    "time_embedding_type": "positional", "timestep_post_act": None, "upcast_attention": False,
    "use_linear_projection": False,
}  # fmt: skip
UNET_0_19 = {
    **UNET_0_16, "addition_time_embed_dim": None, "encoder_hid_dim_type": None, "num_attention_heads": None,
    "transformer_layers_per_block": 1,
}  # fmt: skip
UNET_0_24 = {"attention_type": "default", "dropout": 0.0, "reverse_transformer_layers_per_block": None}
SDXL_SIZES = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048, "down_block_types": SDXL_DOWN,
    "projection_class_embeddings_input_dim": 2816, "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
}  # fmt: skip
UNET_SDXL = {
    **UNET_SD1,
    **UNET_0_19,
    **SDXL_SIZES,
    "sample_size": 128,
    "up_block_types": SDXL_UP,
    "upcast_attention": None,
}

FLUX_TRANSFORMER = {
    "attention_head_dim": 128, "guidance_embeds": True, "in_channels": 64, "joint_attention_dim": 4096,
    "num_attention_heads": 24, "num_layers": 19, "num_single_layers": 38, "patch_size": 1, "pooled_projection_dim": 768,
}  # fmt: skip
ROPE = {"axes_dims_rope": [16, 56, 56]}  # written by diffusers 0.30 and later; FLUX.1-dev and schnell were saved before

VAE = {
    "act_fn": "silu", "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3,
    "sample_size": 512, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
VAE_SDXL = {**VAE, "sample_size": 1024, "scaling_factor": 0.13025}
VAE_FLUX = {
    **VAE_SDXL, "force_upcast": True, "latent_channels": 16, "latents_mean": None, "latents_std": None,
    "mid_block_add_attention": True, "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_post_quant_conv": False,
    "use_quant_conv": False,
}  # fmt: skip
VAE_PLAYGROUND = {
    **VAE_SDXL, "force_upcast": True, "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
    "latents_std": [8.4927, 5.9022, 6.5498, 5.2299], "scaling_factor": 0.5,
}  # fmt: skip

CLIP = {
    "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2, "initializer_factor": 1.0,
    "initializer_range": 0.02, "layer_norm_eps": 1e-05, "max_position_embeddings": 77, "model_type": "clip_text_model",
    "pad_token_id": 1, "vocab_size": 49408,
}  # fmt: skip
CLIP_L = {
    **CLIP, "hidden_act": "quick_gelu", "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
    "num_hidden_layers": 12, "projection_dim": 768,
}  # fmt: skip
CLIP_H = {
    **CLIP, "hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
    "num_hidden_layers": 23, "projection_dim": 512,
}  # fmt: skip
CLIP_G = {
    **CLIP, "hidden_act": "gelu", "hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20,
    "num_hidden_layers": 32, "projection_dim": 1280,
}  # fmt: skip
T5 = {
    "classifier_dropout": 0.0, "d_ff": 10240, "d_kv": 64, "d_model": 4096, "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new", "dropout_rate": 0.1, "eos_token_id": 1, "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0, "is_encoder_decoder": True, "is_gated_act": True, "layer_norm_epsilon": 1e-06,
    "model_type": "t5", "num_decoder_layers": 24, "num_heads": 64, "num_layers": 24, "output_past": True,
    "pad_token_id": 0, "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False, "use_cache": True, "vocab_size": 32128,
}  # fmt: skip


def text(
    config: dict, version: str, path: str | None = None, dtype: str = "float32", cls: str = "CLIPTextModel"
) -> dict:
    """The config.json of a text encoder; `version` is the version of transformers."""
    named = {"_name_or_path": path} if path else {}
    return {"architectures": [cls], **named, **config, "torch_dtype": dtype, "transformers_version": version}


OPENAI = "openai/clip-vit-large-patch14"

# ---- schedulers ----------------------------------------------------------------------------------

BETAS = {
    "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False,
    "num_train_timesteps": 1000, "set_alpha_to_one": False, "steps_offset": 1, "trained_betas": None,
}  # fmt: skip
OLD = {**BETAS, "skip_prk_steps": True}
EULER = {
    **OLD,
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
}
DEIS = {
    **BETAS, "algorithm_type": "deis", "dynamic_thresholding_ratio": 0.995, "lower_order_final": True,
    "prediction_type": "epsilon", "sample_max_value": 1.0, "solver_order": 2, "solver_type": "logrho",
    "thresholding": False,
}  # fmt: skip
EDM = {
    "algorithm_type": "dpmsolver++", "dynamic_thresholding_ratio": 0.995, "euler_at_final": False,
    "final_sigmas_type": "zero", "lower_order_final": True, "num_train_timesteps": 1000, "prediction_type": "epsilon",
    "rho": 7.0, "sample_max_value": 1.0, "sigma_data": 0.5, "sigma_max": 80.0, "sigma_min": 0.002, "solver_order": 2,
    "solver_type": "midpoint", "thresholding": False,
}  # fmt: skip
FLOW = {
    "base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15,
    "num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True,
}  # fmt: skip
FLOW_0_34 = {
    **FLOW, "invert_sigmas": False, "shift_terminal": None, "stochastic_sampling": False,
    "time_shift_type": "exponential", "use_beta_sigmas": False, "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}  # fmt: skip

# ---- tokenizers ----------------------------------------------------------------------------------


def token(content: str, normalized: bool = True) -> dict:
    """A special token as tokenizer files describe it."""
    return {"content": content, "lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}


START = "<|startoftext|>"
END = "<|endoftext|>"
PAD = "!"
CLIP_TOKENIZER = {
    "add_prefix_space": False,
    "do_lower_case": True,
    "errors": "replace",
    "tokenizer_class": "CLIPTokenizer",
}


def old_tokenizer(
    folder: str, path: str | None, pad: str = END, pad_of_map: str | None = None, tidy: bool = False
) -> dict[str, dict]:
    """The files of transformers up to 4.32: whole tokens in tokenizer_config.json. `tidy` adds the key of 4.30."""
    special = {"bos_token": token(START), "eos_token": token(END), "unk_token": token(END)}
    config = {**CLIP_TOKENIZER, **{key: {"__type": "AddedToken", **value} for key, value in special.items()}}
    config.update(
        {"model_max_length": 77, "pad_token": pad}, **({"clean_up_tokenization_spaces": True} if tidy else {})
    )
    if path:
        config.update(name_or_path=path, special_tokens_map_file="./special_tokens_map.json")
    return {
        f"{folder}/tokenizer_config.json": config,
        f"{folder}/special_tokens_map.json": {**special, "pad_token": pad_of_map or pad},
    }


def new_tokenizer(folder: str, normalized: bool, pad: str = END) -> dict[str, dict]:
    """The files of transformers 4.34 and later: added_tokens_decoder; `normalized` is that of <|endoftext|>."""
    tokens = {"49406": token(START), "49407": token(END, normalized)}
    if pad == PAD:
        tokens = {"0": token(PAD, False), **tokens}
    config = {
        **CLIP_TOKENIZER, "added_tokens_decoder": {key: {**value, "special": True} for key, value in tokens.items()},
        "bos_token": START,
        "clean_up_tokenization_spaces": True, "eos_token": END, "model_max_length": 77, "pad_token": pad,
        "unk_token": END,
    }  # fmt: skip
    special = {"bos_token": token(START), "eos_token": token(END, normalized), "unk_token": token(END, normalized)}
    special["pad_token"] = PAD if pad == PAD else token(END, False)
    return {f"{folder}/tokenizer_config.json": config, f"{folder}/special_tokens_map.json": special}


def t5_tokenizer() -> dict[str, dict]:
    """The files of FLUX's second tokenizer."""
    extra = [f"<extra_id_{number}>" for number in range(100)]
    words = {
        "0": "<pad>",
        "1": "</s>",
        "2": "<unk>",
        **{str(32099 - number): word for number, word in enumerate(extra)},
    }
    config = {
        "add_prefix_space": True, "added_tokens_decoder": {key: {**token(word, False), "special": True} for key,
        word in words.items()},
        "additional_special_tokens": extra, "clean_up_tokenization_spaces": True, "eos_token": "</s>",
        "extra_ids": 100, "legacy": True,
        "model_max_length": 512, "pad_token": "<pad>", "sp_model_kwargs": {}, "tokenizer_class": "T5Tokenizer",
        "unk_token": "<unk>",
    }  # fmt: skip
    special = {
        f"{name}_token": token(word, False) for name, word in (("pad", "<pad>"), ("eos", "</s>"), ("unk", "<unk>"))
    }
    return {
        "tokenizer_2/tokenizer_config.json": config,
        "tokenizer_2/special_tokens_map.json": {"additional_special_tokens": extra, **special},
    }


# ---- pipelines -----------------------------------------------------------------------------------

NOTHING = [None, None]
CHECKER = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
# The short form of transformers 4.35; files of 2022 list every default.
CHECKER_CONFIG = {
    "_name_or_path": "CompVis/stable-diffusion-safety-checker", "architectures": ["StableDiffusionSafetyChecker"],
    "initializer_factor": 1.0, "logit_scale_init_value": 2.6592, "model_type": "clip", "projection_dim": 768,
    "text_config": {
        "dropout": 0.0, "hidden_size": 768, "intermediate_size": 3072, "model_type": "clip_text_model",
        "num_attention_heads": 12,
    },
    "torch_dtype": "float16", "transformers_version": "4.35.2",
    "vision_config": {
        "dropout": 0.0, "hidden_size": 1024, "intermediate_size": 4096, "model_type": "clip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14,
    },
}  # fmt: skip
FEATURES = {
    "crop_size": 224, "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True, "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3, "size": 224,
}  # fmt: skip
FEATURES_0_25 = {
    **FEATURES, "crop_size": {"height": 224, "width": 224}, "do_rescale": True,
    "image_processor_type": "CLIPFeatureExtractor", "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 224}, "use_square_size": False,
}  # fmt: skip


def sd(
    version: str | tuple, unet: dict, vae: dict, scheduler: dict, encoder: dict, tokenizer: dict[str, dict],
    index: dict,
    kind: str = "PNDMScheduler", cls: str = "StableDiffusionPipeline", paths: tuple = (None, None),
) -> dict[str, dict]:  # fmt: skip
    """The files of a Stable Diffusion 1 or 2.

    `version`: of its index, scheduler, UNet and VAE; `paths`: _name_or_path of UNet and VAE; `index`: further entries
    of model_index.json.
    """
    versions = (version,) * 4 if isinstance(version, str) else version
    files = {
        "model_index.json": {
            **header(cls, versions[0]), "feature_extractor": ["transformers", "CLIPImageProcessor"],
            "safety_checker": NOTHING,
            "scheduler": ["diffusers", kind], "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"], **index,
        },
        "scheduler/scheduler_config.json": {**header(kind, versions[1]), **scheduler},
        "text_encoder/config.json": encoder,
        **tokenizer,
        "unet/config.json": {**header("UNet2DConditionModel", versions[2], paths[0]), **unet},
        "vae/config.json": {**header("AutoencoderKL", versions[3], paths[1]), **vae},
    }  # fmt: skip
    if files["model_index.json"]["feature_extractor"] != NOTHING:
        files["feature_extractor/preprocessor_config.json"] = FEATURES_0_25 if version == "0.25.0.dev0" else FEATURES
    if files["model_index.json"]["safety_checker"] != NOTHING:
        files["safety_checker/config.json"] = CHECKER_CONFIG
    return files


def sdxl(
    version: str, unet: dict, vae: dict, scheduler: dict, kind: str, transformers: str, tokenizers: dict[str, dict],
    index: dict, dtype: str = "float16",
) -> dict[str, dict]:  # fmt: skip
    """The files of a Stable Diffusion XL."""
    projection = "CLIPTextModelWithProjection"
    return {
        "model_index.json": {
            **header("StableDiffusionXLPipeline", version), "force_zeros_for_empty_prompt": True,
            "scheduler": ["diffusers", kind], "text_encoder": ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", projection], "tokenizer": ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"], **index,
        },
        "scheduler/scheduler_config.json": {**header(kind, version), **scheduler},
        "text_encoder/config.json": text(CLIP_L, transformers, dtype=dtype),
        "text_encoder_2/config.json": text(CLIP_G, transformers, dtype=dtype, cls=projection),
        **tokenizers,
        "unet/config.json": {**header("UNet2DConditionModel", version), **unet},
        "vae/config.json": {**header("AutoencoderKL", version), **vae},
    }  # fmt: skip


def flux(
    version: str, transformer: dict, scheduler: dict = FLOW, cls: str = "FluxPipeline", paths: tuple = (None, None)
) -> dict[str, dict]:  # fmt: skip
    return {
        "model_index.json": {
            **header(cls, version), "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"], "text_encoder_2": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"], "tokenizer_2": ["transformers", "T5TokenizerFast"],
            "transformer": ["diffusers", "FluxTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"],
        },
        "scheduler/scheduler_config.json": {**header("FlowMatchEulerDiscreteScheduler", version), **scheduler},
        "text_encoder/config.json": text(CLIP_L, "4.43.3", OPENAI, "bfloat16"),
        "text_encoder_2/config.json": text(T5, "4.43.3", "google/t5-v1_1-xxl", "bfloat16", "T5EncoderModel"),
        **new_tokenizer("tokenizer", normalized=False), **t5_tokenizer(),
        "transformer/config.json": {**header("FluxTransformer2DModel", version, paths[0]), **transformer},
        "vae/config.json": {**header("AutoencoderKL", version, paths[1]), **VAE_FLUX},
    }  # fmt: skip


def both(make, **settings) -> dict[str, dict]:
    """The files of both tokenizers of SDXL; the second pads with "!"."""
    return {**make("tokenizer", **settings), **make("tokenizer_2", pad=PAD, **settings)}


def sd2_text(folder: str, version: str = "4.25.0.dev0", dtype: str = "float32") -> tuple[dict, dict[str, dict]]:
    """Text encoder and tokenizer of Stable Diffusion 2. The tokenizer's files disagree on padding; "!" is right."""
    names = [folder + name if folder.endswith("/") else folder for name in ("text_encoder", "tokenizer")]
    return text(CLIP_H, version, names[0], dtype), old_tokenizer("tokenizer", names[1], pad_of_map=PAD)


PADDED = {"feature_extractor": NOTHING, "image_encoder": NOTHING}  # in model_index.json since diffusers 0.23
SCALE = {"scaling_factor": 0.18215}
SD1_TOKENIZER = old_tokenizer("tokenizer", OPENAI)
SD1_ENCODER = text(CLIP_L, "4.22.0.dev0", OPENAI)
EXTRACTOR = {"feature_extractor": ["transformers", "CLIPFeatureExtractor"]}
UNCHECKED = {"requires_safety_checker": False}
UNET_0_27 = {**UNET_SDXL, **UNET_0_24, "upcast_attention": False}
UNET_2_1 = {**UNET_SD2, **UNET_0_10}
V_PREDICTION = {"prediction_type": "v_prediction"}
EPSILON = {"prediction_type": "epsilon"}
SD2_768 = "hf-models/stable-diffusion-v2-768x768/"
SD2_RESAVED = "./stability/stable-diffusion-2-1/"
SD2_INPAINTING = "./hf-models/stable-diffusion-v2-inpainting/"
VAE_768 = {**VAE, "sample_size": 768}
VAE_256 = {**VAE, "sample_size": 256}
EULER_0_27 = {
    **EULER, "rescale_betas_zero_snr": False, "sigma_max": None, "sigma_min": None, "timestep_type": "discrete",
    "use_karras_sigmas": False,
}  # fmt: skip


SD_PIPELINES = {
    "stable-diffusion-v1-4": sd(
        ("0.2.2", "0.7.0.dev0", "0.2.2", "0.2.2"), UNET_SD1, {**without(VAE, "norm_num_groups"), **SCALE}, OLD,
        without(text(CLIP_L, "4.21.0.dev0", OPENAI), "projection_dim"), SD1_TOKENIZER, CHECKER,
    ),
    "stable-diffusion-v1-5": sd("0.6.0", UNET_SD1, VAE, OLD, SD1_ENCODER, SD1_TOKENIZER, CHECKER),
    "stable-diffusion-inpainting": sd(
        ("0.6.0", "0.6.0.dev0", "0.6.0.dev0", "0.6.0.dev0"), {**UNET_SD1, "in_channels": 9}, VAE_256, OLD, SD1_ENCODER,
        SD1_TOKENIZER, CHECKER, kind="DDIMScheduler", cls="StableDiffusionInpaintPipeline",
    ),
    "openjourney": sd("0.7.2", UNET_SD1, VAE_256, OLD, text(CLIP_L, "4.24.0", OPENAI), SD1_TOKENIZER, CHECKER),
    "Counterfeit-V2.5": sd(
        "0.10.2",
        {
            **UNET_SD1, **UNET_0_10, "dual_cross_attention": False, "upcast_attention": False,
            "use_linear_projection": False,
        },
        VAE_256, {**OLD, **EPSILON}, text(CLIP_L, "4.25.1", OPENAI),
        old_tokenizer("tokenizer", "CompVis/stable-diffusion-v1-4"),
        {"feature_extractor": NOTHING, "requires_safety_checker": None}, kind="DDIMScheduler",
    ),
    "Realistic_Vision_V5.1_noVAE": sd(
        "0.16.1", {**UNET_SD1, **UNET_0_16}, {**VAE, **SCALE}, {**DEIS, "clip_sample_range": 1.0},
        text(CLIP_L, "4.30.2", OPENAI), old_tokenizer("tokenizer", None, tidy=True),
        {"feature_extractor": NOTHING, "requires_safety_checker": None}, kind="DEISMultistepScheduler",
    ),
    "realistic-vision-v51": sd(
        "0.25.0.dev0", {**UNET_SD1, **UNET_0_19, **UNET_0_24}, {**VAE, **SCALE, "force_upcast": True},
        {**OLD, **EPSILON, "timestep_spacing": "leading"}, text(CLIP_L, "4.35.2", dtype="float16"),
        new_tokenizer("tokenizer", True),
        {**EXTRACTOR, **CHECKER, "image_encoder": NOTHING, "requires_safety_checker": True},
    ),
    # Not available: model_index.json, text encoder and tokenizer. They are those of 2.1, whose paths name this
    # pipeline.
    "stable-diffusion-2": sd(
        "0.8.0", {**UNET_SD2, "sample_size": 96}, VAE_768, {**OLD, **V_PREDICTION}, *sd2_text(SD2_768),
        {**EXTRACTOR, **UNCHECKED}, kind="DDIMScheduler", paths=(SD2_768 + "unet", SD2_768 + "vae"),
    ),
    "stable-diffusion-2-1": sd(
        ("0.8.0", "0.8.0", "0.10.0.dev0", "0.8.0"), {**UNET_2_1, "sample_size": 96, "upcast_attention": True}, VAE_768,
        {**OLD, **V_PREDICTION}, *sd2_text(SD2_768), {**EXTRACTOR, **UNCHECKED}, kind="DDIMScheduler",
        paths=(None, SD2_768 + "vae"),
    ),
    "stable-diffusion-2-1-resaved": sd(
        "0.10.0.dev0", {**UNET_2_1, "sample_size": 96, "upcast_attention": True}, VAE_768, {**OLD, **V_PREDICTION},
        *sd2_text(SD2_RESAVED, "4.26.0.dev0", "float16"), {**EXTRACTOR, **UNCHECKED}, kind="DDIMScheduler",
        paths=(SD2_RESAVED + "unet", SD2_RESAVED + "vae"),
    ),
    "stable-diffusion-2-1-base": sd(
        "0.10.0.dev0", UNET_2_1, VAE_768, {**OLD, **EPSILON}, *sd2_text("stabilityai/stable-diffusion-2"),
        {**EXTRACTOR, **UNCHECKED},
    ),
    "stable-diffusion-2-inpainting": sd(
        "0.8.0", {**UNET_SD2, "in_channels": 9}, VAE, OLD, *sd2_text(SD2_INPAINTING), UNCHECKED,
        cls="StableDiffusionInpaintPipeline", paths=(SD2_INPAINTING + "unet", SD2_INPAINTING + "vae"),
    ),
}  # fmt: skip

XL_BASE = sdxl(
    "0.19.0.dev0", UNET_SDXL, {**VAE_SDXL, "force_upcast": True}, {**EULER, "use_karras_sigmas": False},
    "EulerDiscreteScheduler", "4.32.0.dev0", both(old_tokenizer, path=None, tidy=True), {"add_watermarker": None},
)  # fmt: skip
XL_BASE["vae/config.json"].update(header("AutoencoderKL", "0.20.0.dev0", "../sdxl-vae/"))
XL_0_27 = sdxl(
    "0.27.2", UNET_0_27, {**VAE_SDXL, "force_upcast": True, "latents_mean": None, "latents_std": None}, EULER_0_27,
    "EulerDiscreteScheduler", "4.39.3", both(new_tokenizer, normalized=False), PADDED,
)  # fmt: skip


def xl_like(
    files: dict[str, dict], version: str, kind: str, scheduler: dict | None = None, unet: dict | None = None
) -> dict[str, dict]:
    """The files of a pipeline like `files` with another scheduler or changes to the config of the UNet."""
    index = {
        **without(files["model_index.json"], "add_watermarker"),
        "_diffusers_version": version,
        "scheduler": ["diffusers", kind],
    }
    files = {**files, "model_index.json": index}
    if scheduler:
        files["scheduler/scheduler_config.json"] = {**header(kind, version), **scheduler}
    if unet:
        files["unet/config.json"] = {**files["unet/config.json"], "_diffusers_version": version, **unet}
    return files


# UNetMidBlock2D is a residual block without attention. Not available: the UNet's file. Its shape is the one that others
# report.
SSD_1B = {
    "mid_block_type": "UNetMidBlock2D", "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    "transformer_layers_per_block": [0, 2, 4], "attention_type": "default", "dropout": 0.0,
}  # fmt: skip
SDXL_PIPELINES = {
    "stable-diffusion-xl-base-1.0": XL_BASE,
    "sdxl-turbo": sdxl(
        "0.24.0.dev0", {**UNET_SDXL, **UNET_0_24, "sample_size": 64}, {**VAE_SDXL, "force_upcast": True},
        {**EULER, "timestep_spacing": "trailing"}, "EulerAncestralDiscreteScheduler", "4.36.0.dev0",
        both(new_tokenizer, normalized=True), PADDED,
    ),
    "sdxl-finetune-0.27": XL_0_27,
    "playground-v2.5-1024px-aesthetic": sdxl(
        "0.27.0.dev0", UNET_0_27, VAE_PLAYGROUND, EDM, "EDMDPMSolverMultistepScheduler", "4.35.2",
        both(new_tokenizer, normalized=True), PADDED, "float32",
    ),
    "SSD-1B": xl_like(XL_BASE, "0.19.3", "EulerDiscreteScheduler", unet=SSD_1B),
    # Of these three, one file each was available. The others are those of a pipeline above of about the same age.
    "dreamshaper-xl-1-0": xl_like(
        XL_BASE, "0.21.0.dev0", "DEISMultistepScheduler",
        {
            **DEIS, "interpolation_type": "linear", "skip_prk_steps": True, "timestep_spacing": "leading",
            "use_karras_sigmas": False,
        },
    ),
    "RealVisXL_V4.0": xl_like(XL_BASE, "0.19.3", "EulerDiscreteScheduler"),
    "RealVisXL_V5.0": xl_like(
        XL_0_27, "0.30.0.dev0", "DDIMScheduler",
        {
            **BETAS, **EPSILON, "clip_sample_range": 1.0, "dynamic_thresholding_ratio": 0.995,
            "rescale_betas_zero_snr": False, "sample_max_value": 1.0, "thresholding": False,
            "timestep_spacing": "leading",
        },
    ),
}  # fmt: skip

FLUX_PIPELINES = {
    "FLUX.1-dev": flux(
        "0.30.0.dev0", FLUX_TRANSFORMER,
        paths=("../checkpoints/flux-dev/transformer", "../checkpoints/flux-dev"),
    ),
    "FLUX.1-schnell": flux(
        "0.30.0.dev0", {**FLUX_TRANSFORMER, "guidance_embeds": False},
        {**FLOW, "shift": 1.0, "use_dynamic_shifting": False}, paths=(None, "../checkpoints/flux-dev"),
    ),
    # Known are only the transformer's keys of Krea, and the scheduler and the pipeline's class of Kontext.
    "FLUX.1-Krea-dev": flux("0.35.0.dev0", {**FLUX_TRANSFORMER, **ROPE}, FLOW_0_34),
    "FLUX.1-Kontext-dev": flux(
        "0.34.0.dev0", {**FLUX_TRANSFORMER, **ROPE, "out_channels": None}, FLOW_0_34, "FluxKontextPipeline",
    ),
    "FLUX.1-Fill-dev": flux(
        "0.32.0.dev0", {**FLUX_TRANSFORMER, **ROPE, "in_channels": 384, "out_channels": 64},
        {**FLOW, "invert_sigmas": False}, "FluxFillPipeline",
    ),
    # Not available: the files of Fill with the class and the channels of these two tools.
    **{
        f"FLUX.1-{tool}-dev": flux(
            "0.32.0.dev0", {**FLUX_TRANSFORMER, **ROPE, "in_channels": 128, "out_channels": 64},
            {**FLOW, "invert_sigmas": False}, "FluxControlPipeline",
        )
        for tool in ("Canny", "Depth")
    },
}  # fmt: skip
PIPELINES = {**FLUX_PIPELINES, **SD_PIPELINES, **SDXL_PIPELINES}
