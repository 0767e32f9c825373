"""Every field of megatron-core's three configurations, and whether this trainer takes it from the YAML, and why.

Read against megatron-core 0.16.1 and 0.19.2; `tests/config/test_sections.py` holds that no field of an installed
version is forgotten. A pattern (`moe_*`) stands for all fields that it matches and that no name before it says. What a
field needs of the machine, or of another field, is in `checks/sections.py` and `platform/requirements.py`.
"""

_ARCHITECTURE = "the checkpoint (or the `model:` section) says it"
_TRAINER = "the trainer sets it, because its loss depends on it"
_FOR_NOW = "it is not supported for now"
_DENSE = "it is for models with experts, and the language model is dense"
_OTHER_LAYERS = "it is for layers that the language model does not have"
_GRAPHS = "packs differ in length from micro-batch to micro-batch, and a CUDA graph replays one; leave it out"
_TP_OVERLAP = (
    "Transformer Engine's overlap communicates through buffers of one length, and packs differ; leave it out: "
    "--sequence-parallel overlaps without them"
)
_ATTENTION = "attention over packs is this program's own (`python -m hacl_megatron.platform` says which kernel)"
_NORMS = "norms are Transformer Engine's or this program's own, which have no such choice"
_LOSS = "the loss is this program's own, which takes target rows alone"
_OFFLOADING = "activations are not moved to the host here; save memory with transformer.recompute_granularity"
_VIRTUAL = "it is for virtual pipeline stages, which are not supported"
_INFERENCE = "it is for inference, and this program trains"
_FP16 = "it scales the loss of fp16, and this program trains in bf16 or fp32"
_NOTHING = "nothing here would read it; leave it out"
_TIMERS = "it is for Megatron-LM's timers; this program logs its own"
_ADAM = "this trainer's optimiser is Adam"
_FUNCTION = "it is a Python function, which YAML cannot express"
_FP8_PARAMETERS = "parameters stay in bf16 here, products in FP8 are transformer.fp8; leave it out"
_FP4 = "FP4 is not supported for now; transformer.fp8 is, on GPUs from compute capability 8.9 on"
_FSDP = "it is for Megatron-FSDP, which is not supported for now; use --use-distributed-optimizer"

REFUSED: dict[str, dict[str, tuple[str, ...]]] = {
    "transformer": {
        "use --tensor-model-parallel-size": ("tensor_model_parallel_size",),
        "use --pipeline-model-parallel-size": ("pipeline_model_parallel_size",),
        "use --context-parallel-size": ("context_parallel_size",),
        "use --sequence-parallel": ("sequence_parallel",),
        "use --decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers": (
            "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage", "pipeline_model_parallel_layout",
            "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split",
        ),
        "use --bf16": ("bf16", "fp16", "params_dtype", "pipeline_dtype", "enable_autocast", "autocast_dtype"),
        "use --device": ("transformer_impl", "use_cpu_initialization"),
        _ARCHITECTURE: (
            "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
            "normalization", "layernorm_epsilon", "layernorm_zero_centered_gamma", "add_bias_linear", "add_qkv_bias",
            "gated_linear_unit", "glu_linear_offset", "activation_func", "activation_func_clamp_value",
            "rotary_interleaved", "no_rope_freq", "mrope_section", "qk_layernorm", "qk_l2_norm", "softmax_scale",
            "softmax_type", "window_size", "window_attn_skip_freq", "attention_output_gate", "multi_latent_attention",
            "experimental_attention_variant", "apply_residual_connection_post_layernorm", "is_hybrid_model",
            "heterogeneous_block_specs", "mtp_num_layers",
        ),
        _TRAINER: (
            "variable_seq_lengths", "calculate_per_token_loss", "moe_token_dispatcher_type", "timers",
            "finalize_model_grads_func", "grad_scale_func", "no_sync_func", "grad_sync_func", "param_sync_func",
        ),
        "the trainer draws what no checkpoint holds": ("perform_initialization", "init_model_with_meta_device"),
        _FOR_NOW: (
            "hierarchical_context_parallel_sizes", "hybrid_context_parallel", "cp_comm_type",
            "max_seqlen_per_dp_cp_rank", "use_mup", "mup_*", "tensor_parallel_num_weight_shards",
            "gtp_weight_remat_size", "use_transformer_engine_op_fuser", "delay_wgrad_compute",
            "defer_embedding_wgrad_compute", "wgrad_deferral_limit", "fused_residual_rmsnorm", "use_te_activation_func",
            "num_microbatches_with_partial_activation_checkpoints", "hetereogenous_dist_checkpoint", "use_kitchen*",
            "kitchen_*", "quant_recipe",
        ),
        "it keeps activations in FP8 without a scale, so that small ones and their gradients vanish; use "
        "transformer.recompute_modules: [mlp]": ("activation_func_fp8_input_store",),
        "it needs torch built with ring exchange; leave it out": ("use_ring_exchange_p2p",),
        "the layers multiply bf16 weights, which an fp32 residual stream does not fit; leave --bf16 out for fp32": (
            "fp32_residual_connection",
        ),
        "queries, keys and values are rotated one by one; use transformer.apply_rope_fusion": (
            "fused_single_qkv_rope",
        ),
        _GRAPHS: (
            "enable_cuda_graph", "external_cuda_graph", "cuda_graph_*", "inference_cuda_graph_scope",
            "delay_offload_until_cuda_graph",
        ),
        "it is for CUDA graphs, which packs of changing length rule out; leave it out": ("use_te_rng_tracker",),
        _TP_OVERLAP: ("tp_comm_*",),
        _ATTENTION: (
            "attention_backend", "flash_attention_version", "attention_softmax_in_fp32", "masked_softmax_fusion",
            "apply_query_key_layer_scaling", "qk_clip*", "log_max_attention_logit", "fp8_dot_product_attention",
            "fp8_multi_head_attention",
        ),
        "attention over packs has no dropout here; use transformer.hidden_dropout": ("attention_dropout",),
        _NORMS: ("persist_layer_norm", "memory_efficient_layer_norm"),
        _LOSS: ("cross_entropy_loss_fusion", "cross_entropy_fusion_impl"),
        _OFFLOADING: (
            "cpu_offloading*", "fine_grained_*", "offload_modules", "min_offloaded_tensor_size",
            "delta_offload_bytes_across_pp_ranks", "activation_offload_fraction",
        ),
        _VIRTUAL: (
            "virtual_pipeline_model_parallel_size", "microbatch_group_size_per_vp_stage", "overlap_p2p_comm",
            "overlap_p2p_comm_warmup_flush",
        ),
        _FP8_PARAMETERS: ("fp8_param", "fp8_output_proj"),
        _FP4: ("fp4*",),
        "it has had no effect since Transformer Engine 1.8; leave it out": ("fp8_interval",),
        _FUNCTION: (
            "init_method", "output_layer_init_method", "embedding_init_method", "moe_grad_scale_func",
            "mtp_grad_scale_func", "experimental_attention_variant_loss_scale_func", "fp8_quantizer_factory",
        ),
        _DENSE: (
            "num_moe_experts", "expert_*", "moe_*", "overlap_moe_expert_parallel_comm", "use_grouped_gemm_*",
            "overlap_dispatch_backward_with_experts_wgrad", "ep_overlap_*", "high_priority_a2a_comm_stream",
        ),
        _OTHER_LAYERS: ("mtp_*", "dsa_*", "linear_*", "mamba_*", "use_mamba_*", "use_fused_weighted_squared_relu"),
        _INFERENCE: (
            "flash_decode", "batch_invariant_mode", "inference_*", "use_inference_optimized_layers",
            "symmetric_ar_type", "nccl_all_reduce_for_prefill", "mlp_chunks_for_prefill",
        ),
        _TIMERS: ("barrier_with_L1_time",),
        _NOTHING: (
            "deterministic_mode", "pipeline_model_parallel_comm_backend", "clone_scatter_output_in_embedding",
            "config_logger_dir", "test_mode", "async_tensor_model_parallel_allreduce",
        ),
    },
    "ddp": {
        "use --overlap-grad-reduce": ("overlap_grad_reduce",),
        "use --overlap-param-gather": ("overlap_param_gather",),
        "use --use-distributed-optimizer": ("use_distributed_optimizer",),
        _TRAINER: ("average_in_collective", "gradient_reduce_div_fusion"),
        _FOR_NOW: (
            "num_distributed_optimizer_instances", "delay_wgrad_compute", "nccl_ub", "disable_symmetric_registration",
            "param_name_patterns_for_fp32_local_accumulation",
        ),
        _FSDP: (
            "use_megatron_fsdp", "use_custom_fsdp", "data_parallel_sharding_strategy", "outer_dp_sharding_strategy",
            "fsdp_*", "megatron_fsdp_*", "suggested_communication_unit_size", "preserve_fp32_weights",
            "keep_fp8_transpose_cache",
        ),
        _FP8_PARAMETERS: ("fp8_param_gather", "fp4_param_gather", "reuse_grad_buf_for_mxfp8_param_ag"),
        _VIRTUAL: ("align_param_gather",),
    },
    "optimizer": {
        "use --lr": ("lr",),
        "use --min-lr": ("min_lr",),
        "use --connector-lr, --vision-lr and --heads-lr": ("decoupled_lr", "decoupled_min_lr"),
        "use --weight-decay": ("weight_decay", "decoupled_weight_decay"),
        "use --clip-grad": ("clip_grad",),
        "use --adam-beta1": ("adam_beta1",),
        "use --adam-beta2": ("adam_beta2",),
        "use --adam-eps": ("adam_eps",),
        "use --bf16": ("bf16", "fp16", "params_dtype"),
        "use --use-distributed-optimizer": ("use_distributed_optimizer",),
        "use --overlap-param-gather": ("overlap_param_gather", "overlap_param_gather_with_optimizer_step"),
        "use --log-num-zeros-in-grad": ("log_num_zeros_in_grad",),
        _ADAM: (
            "optimizer", "sgd_momentum", "muon_*", "lion_*", "soap_*", "adaptive_muon_*",
            "use_layer_wise_distributed_optimizer",
        ),
        "no norm is decayed here, as in LLaVA; --weight-decay is for matrices": ("apply_wd_to_qk_layernorm",),
        "a step is skipped where its loss or gradients are not finite, and clipped by --clip-grad": (
            "grad_norm_skip_threshold",
        ),
        _FP16: ("loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"),
        _FP8_PARAMETERS: ("fp8_recipe", "reuse_grad_buf_for_mxfp8_param_ag"),
        "the optimiser's state stays on the GPU here; save memory with --use-distributed-optimizer": (
            "optimizer_cpu_offload", "optimizer_offload_fraction", "use_torch_optimizer_for_cpu_offload",
            "overlap_cpu_optimizer_d2h_h2d", "pin_cpu_*",
        ),
        _GRAPHS: ("optimizer_cuda_graph",),
        _TIMERS: ("barrier_with_L1_time",),
        _NOTHING: ("config_logger_dir",),
        _TRAINER: ("timers",),
    },
}  # fmt: skip
"""For each section: what to do instead or why not, and the fields it is said of."""

TAKEN: dict[str, dict[str, tuple[str, ...]]] = {
    "transformer": {
        "of `TransformerBlock` and its layers, the last one included": (
            "hidden_dropout", "bias_activation_fusion", "bias_dropout_fusion", "apply_rope_fusion",
            "gradient_accumulation_fusion", "mlp_chunks_for_training", "disable_bf16_reduced_precision_matmul",
        ),
        "of random weights": ("init_method_std", "embedding_init_method_std"),
        "of `TransformerBlock`; the last layer, whose rows are few, recomputes its MLP alone": (
            "recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules",
            "distribute_saved_activations",
        ),
        "of the pipeline's schedule": ("batch_p2p_comm", "batch_p2p_sync", "deallocate_pipeline_outputs"),
        "FP8 products of Transformer Engine's layers": (
            "fp8", "fp8_recipe", "fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo", "fp8_wgrad",
            "tp_only_amax_red", "first_last_layers_bf16", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16",
            "disable_parameter_transpose_cache",
        ),
    },
    "ddp": {
        "of the gradient buffers": (
            "grad_reduce_in_fp32", "check_for_nan_in_grad", "check_for_large_grads", "bucket_size", "num_buckets",
            "pad_buckets_for_high_nccl_busbw", "reduce_scatter_with_fp32_accumulation",
        ),
    },
    "optimizer": {
        "the precision-aware Adam of Transformer Engine": (
            "use_precision_aware_optimizer", "store_param_remainders", "main_grads_dtype", "main_params_dtype",
            "exp_avg_dtype", "exp_avg_sq_dtype",
        ),
    },
}  # fmt: skip
"""For each section: the fields that a YAML may set, under what they are of."""
