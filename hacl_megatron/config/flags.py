"""Every flag of the trainer, one dataclass per concern; each field is documented where it is declared.

`transformers.HfArgumentParser` turns the fields into flags, so `--micro-batch-size` and `--micro_batch_size`
are one, and `_argument_group_name` is a heading of `--help`. Names are Megatron-LM's where Megatron has the
thing and LLaVA's where LLaVA has it.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from hacl_megatron.config.towers import tower_origins

# ruff: noqa: RUF009 -- `flag` returns a dataclass field

MANIFEST_FILE = "manifest.arrow"
"""Says that a folder holds prepared data (tools/prepare_data.py), which `--data-path` then takes."""

MAX_IMAGE_PIXELS = 8192 * 8192
"""Decoding so many stays within 2 GB, whatever the format: a WebP takes 24 bytes a pixel, and may have 28 bytes."""

TEMPERATURE_RANGE = (0.001, 0.5)
"""Bounds that the learned temperature is kept in."""


def flag(default: Any, help: str, metavar: str | None = None) -> Any:
    """A dataclass field with its help text; lists get a fresh copy per instance.

    Args:
        metavar: what `--help` calls a text that is no NAME; numbers, switches and choices speak for themselves.
    """
    metadata = {"help": help} if metavar is None else {"help": help, "metavar": metavar}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelFlags:
    """What is trained, and from which weights."""

    _argument_group_name = "model"

    pretrained_checkpoint: str | None = flag(
        None, "Weights to start from: a Hugging Face folder of a LLaVA, a BLIP-2 or a language model, or a checkpoint "
        "of this trainer. Takes weights, connector, heads and temperature; optimiser, iteration and queue start fresh.",
        metavar="DIR"
    )  # fmt: skip
    pretrain_mm_mlp_adapter: str | None = flag(
        None, "LLaVA's mm_projector.bin or MiniGPT-4's llama_proj, or a folder with one, laid over the connector of "
        "--pretrained-checkpoint.", metavar="FILE"
    )  # fmt: skip
    vision_tower: str | None = flag(
        None, f"Folder of the vision tower: {tower_origins()}, whose Q-Former is taken too. For a "
        "--pretrained-checkpoint without one: a language model, whose connector then starts fresh, or LLaVA's original "
        "layout.", metavar="DIR"
    )  # fmt: skip
    tokenizer: str | None = flag(
        None, "Folder of the tokenizer. Default: the one inside --pretrained-checkpoint.", metavar="DIR"
    )  # fmt: skip
    mm_projector_type: str | None = flag(
        None, "Connector: linear, mlp2x_gelu or mlpNx_gelu; qformer where the checkpoint holds one (BLIP-2), which "
        "hands on a few query tokens an image. Default: the checkpoint's, else mlp2x_gelu.", metavar="TYPE"
    )  # fmt: skip
    mm_vision_select_layer: int | None = flag(
        None, "Vision-tower hidden state that feeds the connector; -2 is the last but one layer. Default: the "
        "checkpoint's, else -2."
    )  # fmt: skip
    image_grid_pinpoints: str | None = flag(
        None, "Cut pictures of any resolution into tiles: next or onevision for the grids of LLaVA-NeXT and "
        "LLaVA-OneVision (which pools beyond 9 tiles), or sizes, height x width in pixels, such as 336x672,672x336. "
        "Default: the checkpoint's, else none.", metavar="GRIDS"
    )  # fmt: skip
    vision_backend: Literal["megatron", "hf"] | None = flag(
        None, "megatron: megatron-core's CLIP, tensor parallel. hf: transformers' own model, replicated on the first "
        "stage; any tower. Default: the checkpoint's; megatron for CLIP."
    )  # fmt: skip
    freeze_LM: bool = flag(False, "Freeze the language model (stage 1, pretrain).")
    freeze_ViT: bool = flag(True, "Freeze the vision tower.")
    freeze_qformer: bool = flag(
        True, "Freeze the query tokens and Q-Former of --mm-projector-type qformer; the projection behind them trains."
    )  # fmt: skip
    bf16: bool = flag(
        False, "Parameters and activations in bfloat16, master weights and reductions in fp32; switches "
        "--use-distributed-optimizer on."
    )  # fmt: skip


@dataclass
class LoraFlags:
    """Low-rank adapters beside the language model's linear layers, whose own weights then stay frozen."""

    _argument_group_name = "LoRA"

    lora_rank: int | None = flag(
        None, "Rank of the adapters; they train, with --freeze-LM or without. Default: the rank in the checkpoint that "
        "is resumed or started from, else no adapters."
    )  # fmt: skip
    lora_alpha: float | None = flag(
        None, "Numerator of the adapters' weight alpha / rank. Default: twice the rank, as LLaVA's recipe has it."
    )  # fmt: skip
    lora_dropout: float = flag(0.0, "Share of the adapters' inputs that is dropped in training.")
    lora_target_modules: list[str] = flag(
        [], "Linear layers of the language model that get adapters, by Hugging Face's names: q_proj k_proj v_proj "
        "o_proj gate_proj up_proj down_proj. Default: all, as in LLaVA's recipe."
    )  # fmt: skip


@dataclass
class ParallelFlags:
    """How the model is laid out over processes, and on which device."""

    _argument_group_name = "parallelism"

    tensor_model_parallel_size: int = flag(1, "Ranks that share every layer's matrices.")
    pipeline_model_parallel_size: int = flag(1, "Pipeline stages. The vision tower and connector live on the first.")
    context_parallel_size: int = flag(
        1, "Ranks that share the rows of every pack, for long records: each runs the language model for its part, and "
        "attention gathers keys and values. Images are shared out too; heads and losses are the same on all."
    )  # fmt: skip
    sequence_parallel: bool = flag(
        False, "Between tensor-parallel layers, split activations by rows over the same ranks: less memory."
    )  # fmt: skip
    vision_parallel: Literal["split", "share"] | None = flag(
        None, "How tensor-parallel ranks run the vision tower: split its matrices, or share images out, each with the "
        "whole tower and connector. Default: what the plan finds faster; towers of transformers are never split."
    )  # fmt: skip
    decoder_first_pipeline_num_layers: int | None = flag(
        None, "Layers of the language model on the first pipeline stage, which also carries the vision tower. Default: "
        "an even split."
    )  # fmt: skip
    decoder_last_pipeline_num_layers: int | None = flag(
        None, "Layers of the language model on the last pipeline stage, which also carries the LM head. Default: an "
        "even split."
    )  # fmt: skip
    make_vocab_size_divisible_by: int = flag(
        128, "The vocabulary is padded to a multiple of this and of the tensor-parallel size."
    )  # fmt: skip
    use_distributed_optimizer: bool = flag(False, "Shard optimiser state and master weights over data-parallel ranks.")
    overlap_grad_reduce: bool = flag(False, "Reduce gradients while the backward pass still runs.")
    overlap_param_gather: bool = flag(
        False, "Gather updated parameters while the next forward pass runs; needs --use-distributed-optimizer and "
        "--overlap-grad-reduce."
    )  # fmt: skip
    device: Literal["auto", "cuda", "cpu"] = flag("auto", "auto: CUDA if there is a device, else CPU and gloo.")
    distributed_timeout_minutes: int = flag(30, "How long a collective may wait for the other ranks.")
    hang_timeout: float = flag(
        1800.0, "Seconds without a finished step, validation batch or save after which every rank prints its stack and "
        "the run ends; 0 never."
    )  # fmt: skip


@dataclass
class DataFlags:
    """Where samples come from and how they become token rows and pixels."""

    _argument_group_name = "data"

    data_path: list[str] = flag(
        [], "LLaVA JSON file(s) (id, image, conversations; text and 'Hallucination caption'), or folders that "
        "tools/prepare_data.py made of them; paths, or URLs such as s3://BUCKET/FOLDER. A raw file is prepared into a "
        "cache when it is first used.", metavar="PATH"
    )  # fmt: skip
    data_weights: list[float] = flag(
        [], "How often an epoch draws the samples of each --data-path: 2 twice, 0.5 every other epoch. Default: once."
    )  # fmt: skip
    contrastive_data_path: list[str] = flag(
        [], "Contrastive samples, as for --data-path, spread evenly through the epoch beside those.", metavar="PATH"
    )  # fmt: skip
    valid_data_path: list[str] = flag([], "Data for validation, as for --data-path.", metavar="PATH")
    data_cache_dir: str | None = flag(
        None, "Where raw JSON is kept prepared. Default: .hacl_megatron_cache beside the file, else "
        "~/.cache/hacl_megatron, else the temporary folder. What is read from URLs is kept there too, on each node's "
        "own disk; default: the temporary folder.", metavar="DIR"
    )  # fmt: skip
    data_cache_gb: float = flag(
        20.0, "Images from URLs that a node keeps, in GB; what finds no room is read again in each epoch. Manifests "
        "and JSON are copied whole beside them."
    )  # fmt: skip
    group_by_modality_length: bool = flag(
        False, "Fill each global batch with samples that all have an image, or all have none, the longest first."
    )  # fmt: skip
    shuffle_block: int = flag(
        0, "Shuffle blocks of this many consecutive samples, eight blocks at a time, for images that do not fit a "
        "node's cache. 0 shuffles all samples."
    )  # fmt: skip
    image_folder: str = flag(
        ".", "Folder, or URL, that the image names in the JSON files are relative to; not needed for prepared shards. "
        "Default: the working folder.", metavar="DIR"
    )  # fmt: skip
    version: str = flag(
        "v1", "Conversation template, a file of hacl_megatron/data/templates: plain for pretrain; for finetune LLaVA's "
        "v1 (Vicuna), LLaVA-NeXT's chatml (Qwen), llama_3 or mistral, minigpt4 (###Human: ...), or chat: the "
        "tokenizer's own. MiniGPT-4's first stage has no prompt: use plain."
    )  # fmt: skip
    image_aspect_ratio: Literal["pad", "square", "stretch"] = flag(
        "pad", "pad: fill to a square with the mean colour, then resize. square: resize the shorter edge, then crop "
        "the centre. stretch: resize to the square as BLIP-2 and MiniGPT-4 do. Not looked at where the model cuts "
        "pictures into tiles."
    )  # fmt: skip
    image_transparency: Literal["drop", "fill"] = flag(
        "drop", "drop: show the colours that a file has where it is transparent, often black, as LLaVA does. fill: "
        "lay it on the mean colour, that of --image-aspect-ratio pad."
    )  # fmt: skip
    image_orientation: Literal["ignore", "exif"] = flag(
        "ignore", "ignore: pictures as they are stored, as LLaVA takes them. exif: turned as their EXIF says, as "
        "transformers' load_image does."
    )  # fmt: skip
    model_max_length: int = flag(2048, "Dialogues are cut here, counted after the image is expanded.")
    image_backend: Literal["auto", "dali", "pillow"] = flag(
        "auto", "Decoder and resizer. auto: DALI where it is installed, else Pillow."
    )  # fmt: skip
    num_workers: int = flag(2, "Threads that decode images.")
    io_threads: int = flag(8, "Threads that read image files ahead; more of them hide slower storage.")
    prefetch_steps: int = flag(2, "Optimiser steps whose batches are prepared ahead.")
    max_bad_fraction: float = flag(0.01, "Stop the run when more than this share of the samples drawn is unusable.")
    max_image_pixels: int = flag(
        MAX_IMAGE_PIXELS, "Refuse to decode an image with more pixels (decompression bombs); so many take 2 GB."
    )  # fmt: skip


@dataclass
class ObjectiveFlags:
    """The contrastive part of the loss."""

    _argument_group_name = "contrastive objective"

    contrastive_weight: float = flag(1.0, "Lambda: weight of (L_v + L_t) / 2 beside the language-model loss.")
    contrastive_warmup_fraction: float = flag(
        0.0, "Share of the run over which lambda rises, geometrically from a ten-thousandth, to "
        "--contrastive-weight: the connector learns the model's words first, and the heads before it follows."
    )  # fmt: skip
    contrastive_negatives: Literal["micro-batch", "global-batch", "queue"] = flag(
        "global-batch", "Pool of negatives. micro-batch: the pairs of one micro-batch of all data-parallel ranks. "
        "global-batch: every pair of the optimiser step. queue: these and a queue of earlier pairs."
    )  # fmt: skip
    queue_size: int = flag(16_384, "Pairs that the queue of --contrastive-negatives queue holds.")
    hallucination_negatives: Literal["own", "all", "none"] = flag(
        "all", "Hallucinated captions in a pair's denominator: its own (the paper), every one in the pool (the "
        "released code), or none (plain contrastive)."
    )  # fmt: skip
    hallucination_weight: float = flag(
        1.0, "Hallucinated captions count this many times in a denominator. A pair's own (own) hardly weighs among the "
        "captions of a large batch; as many times as there are captions, it is half of what the pair is compared with."
    )  # fmt: skip
    mask_duplicates: bool = flag(True, "Do not take another pair with the same caption or image as a negative.")
    contrastive_image_context: Literal["image", "prompt"] = flag(
        "image", "What precedes the image's EOS. image: the image alone (as released). prompt: the prefix of the "
        "dialogue too."
    )  # fmt: skip
    heads_init: Literal["independent", "same"] = flag(
        "independent", "First values of fresh heads. independent: images' and texts' are drawn apart (as released). "
        "same: both get the same, so that the first similarities are those of the language model's own states."
    )  # fmt: skip
    initial_temperature: float = flag(0.07, "Temperature that fresh heads start from; it is learned.")


@dataclass
class PreferenceFlags:
    """A likelihood objective on twins: hallucinated captions in the place of the true answer, and rejected answers."""

    _argument_group_name = "likelihood objective"

    preference_loss: Literal["none", "dpo", "mdpo", "phrase"] = flag(
        "none", "phrase: of the tokens in which a twin differs from the true answer, those of the answer are to be "
        "likelier (after HALVA). dpo: the whole answer is to be so, by more than in the weights that the run started "
        "from. mdpo: also with the image than with a small crop of it, and than in those weights."
    )  # fmt: skip
    preference_weight: float = flag(1.0, "Gamma: weight of the likelihood objective's mean over twins.")
    generation_weight: float = flag(1.0, "w_G: weight of the language-model loss.")
    preference_beta: float = flag(0.1, "dpo, mdpo: beta, by which log-likelihoods over the reference's are multiplied.")
    preference_label_smoothing: float = flag(0.0, "dpo: share of twins taken to be the true answer (conservative DPO).")
    reference_scores: str | None = flag(
        None, "dpo, mdpo: file of tools/score_reference.py, what the first weights make of the answers. Default: "
        "computed at the run's start and kept in --save."
    )  # fmt: skip

    @property
    def has_reference(self) -> bool:
        """Whether the objective compares with the weights that the run started from."""
        return self.preference_loss in ("dpo", "mdpo")


@dataclass
class OptimizerFlags:
    """Adam, its schedule and its rates."""

    _argument_group_name = "optimiser"

    lr: float = flag(1e-3, "Peak learning rate.")
    min_lr: float = flag(0.0, "Learning rate that the schedule decays to.")
    connector_lr: float | None = flag(None, "Peak learning rate of the connector, a Q-Former included. Default: --lr.")
    vision_lr: float | None = flag(None, "Peak learning rate of a trained vision tower. Default: --lr.")
    heads_lr: float | None = flag(None, "Peak learning rate of the contrastive heads and temperature. Default: --lr.")
    lr_decay_style: Literal["cosine", "linear", "constant"] = flag("cosine", "Shape of the decay after warm-up.")
    lr_warmup_fraction: float = flag(0.03, "Share of the run with a linearly rising learning rate.")
    weight_decay: float = flag(0.0, "Decoupled weight decay; none on biases, norms and the temperature.")
    adam_beta1: float = flag(0.9, "Decay of Adam's first moment.")
    adam_beta2: float = flag(0.999, "Decay of Adam's second moment.")
    adam_eps: float = flag(1e-8, "Adam's epsilon.")
    clip_grad: float = flag(1.0, "Clip the global gradient norm to this; 0 clips nothing.")
    clip_heads_apart: bool = flag(
        False, "Clip the contrastive heads and all others each by a norm of their own, both to --clip-grad."
    )
    max_skipped_steps: int = flag(10, "Stop after this many steps in a row with a non-finite loss or gradient.")


@dataclass
class TrainingFlags:
    """Length of the run, batch sizes and validation."""

    _argument_group_name = "training"

    micro_batch_size: int = flag(1, "Samples of one data-parallel rank that run at once.")
    micro_batch_tokens: int | None = flag(
        None, "Packed rows of one data-parallel rank that run at once, instead of --micro-batch-size: a step has as "
        "many micro-batches as that takes."
    )  # fmt: skip
    balance_micro_batches: bool | None = flag(
        None, "Even out the work of a step's replicas and micro-batches: rows, and images' views where samples differ "
        "in them; changes nothing but time. Default: true, except with --contrastive-negatives micro-batch, where it "
        "is false."
    )  # fmt: skip
    global_batch_size: int | None = flag(
        None, "Samples of one optimiser step over all ranks. Default: micro-batch size x data-parallel size."
    )  # fmt: skip
    train_iters: int | None = flag(
        None, "Optimiser steps to train for. Either this or --num-train-epochs must be given."
    )  # fmt: skip
    num_train_epochs: float | None = flag(None, "Passes over the data, instead of --train-iters.")
    exit_interval: int | None = flag(
        None, "Save and stop at every iteration divisible by this; the schedule is not shortened."
    )  # fmt: skip
    exit_duration_in_mins: float | None = flag(None, "Save and stop after this many minutes.")
    eval_interval: int = flag(0, "Validate every so many iterations; 0 never does.")
    eval_iters: int = flag(10, "Global batches in each validation.")
    eval_tasks: list[str] = flag(
        [], "Also evaluate at each validation, on its samples: preference (is a caption likelier than its hallucinated "
        "twins), retrieval (image to caption and back).", metavar="TASK"
    )  # fmt: skip
    seed: int = flag(1234, "Seeds parameters, data order and every random choice about a sample.")
    print_config: bool = flag(False, "Print the whole resolved configuration and stop.")
    dry_run: bool = flag(
        False, "Build parts of the model without allocating weights, without data or other processes, say what would "
        "be trained, and stop: shows on a laptop whether a cluster's configuration can be built."
    )  # fmt: skip
    world_size: int | None = flag(None, "With --dry-run: processes of the run that is tried.")
    dry_run_rank: int | None = flag(
        None, "With --dry-run: build this rank's part alone. Default: one rank of each kind of pipeline stage."
    )  # fmt: skip


@dataclass
class CheckpointFlags:
    """Where the run is saved and resumed from."""

    _argument_group_name = "checkpoints"

    save: str | None = flag(
        None, "Folder for checkpoints, metrics.jsonl and bad_samples.jsonl. Without it nothing is saved.", metavar="DIR"
    )  # fmt: skip
    load: str | None = flag(
        None, "Resume everything from this folder when it holds a checkpoint; wins over --pretrained-checkpoint.",
        metavar="DIR"
    )  # fmt: skip
    save_interval: int = flag(0, "Save every so many iterations; 0 saves at the end alone.")
    async_save: bool = flag(
        True, "Train on while a checkpoint is written; each rank keeps a copy of what it writes in host memory."
    )  # fmt: skip
    save_retain: int | None = flag(None, "Keep this many newest checkpoints and delete older ones. Default: keep all.")
    save_keep_interval: int | None = flag(
        None, "With --save-retain: never delete a checkpoint whose iteration this divides."
    )  # fmt: skip
    load_fallback: bool = flag(
        False, "When the newest checkpoint in --load is damaged, resume from the newest one that is whole."
    )  # fmt: skip


@dataclass
class LoggingFlags:
    """What the user sees of a run."""

    _argument_group_name = "logging"

    tensorboard_dir: str | None = flag(None, "Folder for TensorBoard events. Default: SAVE/tensorboard.", metavar="DIR")
    log_interval: int = flag(1, "Log every so many iterations.")
    log_params_norm: bool = flag(False, "Also log the L2 norm of the trained parameters.")
    log_num_zeros_in_grad: bool = flag(False, "Also log how many gradient entries are zero.")
    wandb_project: str | None = flag(None, "Also log to this Weights & Biases project.")
    profile_step_start: int | None = flag(
        None, "First iteration of a torch.profiler trace, which Perfetto and TensorBoard open: TENSORBOARD_DIR/profile."
    )  # fmt: skip
    profile_step_end: int | None = flag(None, "With --profile-step-start: the iteration before which the trace ends.")
    profile_ranks: list[int] = flag([0], "Ranks that write a trace.")


FLAG_GROUPS = (
    ModelFlags, LoraFlags, ParallelFlags, DataFlags, ObjectiveFlags, PreferenceFlags, OptimizerFlags,
    TrainingFlags, CheckpointFlags, LoggingFlags,
)  # fmt: skip
