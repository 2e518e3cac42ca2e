"""Every field with its default for a small model. Other configs start from here and say what differs."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The defaults."""
    return ConfigDict(
        dict(
            seed=0,
            train=dict(
                steps=1000, batch_size=64, accumulation=1, learning_rate=1e-3, warmup_steps=100, decay="cosine",
                weight_decay=0.0, b1=0.9, b2=0.99, clip_norm=1.0, ema_decay=0.999, caption_dropout=0.1,
                trainable="full", lora_rank=8, init_from="",
                precision="float32", remat="none", attention="auto",
                log_every=50, checkpoint_every=500, keep_checkpoints=2, sample_every=500,
                keep_best=0, best_metric="loss", max_nonfinite=3, peer_timeout=600,
            ),
            data=dict(
                source="shapes", path="", metadata="", heldout_metadata="", caption_field="text", caption_choice="first",
                max_broken_fraction=0.01, index_folder="", image_size=32, crop="centre", resample="lanczos", buckets=(),
                bucket_max_ratio=0.0, bucket_step=64, num_objects=(1, 1),
                heldout_fraction=0.125, position_fraction=0.5, seed=0, max_length=32, tokenizer="",
                num_workers=0, prefetch=2,
            ),
            diffusion=dict(
                schedule="cosine", num_timesteps=1000, beta_start=1e-4, beta_end=2e-2, zero_terminal_snr=False,
                prediction_type="v", weighting="uniform", gamma=5.0, timestep_sampling="stratified",
                prior_kl=0.0,
            ),
            context=dict(
                kind="cross_attention", shift="quadratic", estimate="plugin", max_gain=0.2, head_loss=1.0,
                tokens="patches", clip="", time_dependent=False, patch_size=4, width=64, num_blocks=2, num_heads=4,
            ),
            text=dict(pretrained="", vocab_size=4096, max_length=32, width=128, num_layers=2, num_heads=4),
            model=dict(
                pretrained="", in_channels=3, out_channels=3, block_out_channels=(32, 64, 128), layers_per_block=1,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                attention_head_dim=4, cross_attention_dim=128, norm_num_groups=16, resnet_time_scale_shift="default",
            ),
            mesh=dict(
                data=-1, fsdp=1, tensor=1, sequence=1,
                # What each kind of dimension is split over (parallel/mesh.py); '' is nothing, 'data,fsdp' is both.
                rules=dict(
                    batch="data,fsdp", rows="sequence", width="fsdp", heads="tensor", hidden="tensor",
                    channels="tensor", vocab="",
                ),
            ),
            sample=dict(
                prompts=(), sampler="ddim", steps=50, eta=0.0, guidance=3.0, guidance_rescale=0.0,
                dynamic_threshold=0.0, spacing="trailing", steps_offset=0, set_alpha_to_one=True, reuse=1,
            ),
            latent=dict(vae=""),
        )
    )
