"""How many rows one micro-batch has, of which kind, and which of them autograd follows.

No data is read: the lengths are averages (`Samples`), printed with the plan and changed by flags.
"""

from dataclasses import dataclass
from pathlib import Path

from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.config.run import RunConfig

PUBLISHED_SAMPLES = {"blip_laion_cc_sbu_558k.json": 558_128, "llava_v1_5_mix665k.json": 665_298}
"""Entries of LLaVA-1.5's two published files, so that a run can be planned before they are downloaded."""


@dataclass(frozen=True, kw_only=True)
class StepRules:
    """What the training step saves itself. This file, `activations` and `compute` follow it; nothing else does."""

    text_without_autograd: bool = False
    """Captions run without autograd where the LLM is frozen: nothing on their path to the heads trains."""
    shared_image_prefix: bool = False
    """With `--contrastive-image-context prompt` the image's EOS stands behind the dialogue's image: no second pass."""
    last_layer_read_rows_only: bool = False
    """The last layer's queries, output and MLP run for the rows that the LM head or the contrastive heads read."""
    drops_unused_pairs: bool = False
    """With `--contrastive-weight 0` pairs are not run at all, not even for the metrics."""


STEP = StepRules()
"""The step as `training.step` and `model.hacl` have it."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Averages over the samples of a run: assumptions, unless they were given."""

    num_samples: int | None
    """Samples of one epoch; None: unknown."""
    image_share: float
    """Share of the samples with an image."""
    text_tokens: float
    """Rows of a dialogue beside its image."""
    target_tokens: float
    """Rows of a dialogue with a target."""
    pair_share: float
    """Share of the samples that are an image-caption pair."""
    caption_tokens: float
    """Rows of a caption's segment, BOS and EOS included; a hallucinated one is as long."""
    hallucinated_per_pair: float


def assumed_samples(config: RunConfig) -> Samples:
    """What LLaVA-1.5's data looks like, by template; `num_samples` from the names of its published files.

    plain: one short caption an image, every sample a pair. v1: dialogues of several turns behind the system prompt,
    40,688 of 665,298 without an image; pairs are what `--contrastive-data-path` mixes in, taken to be as many.
    """
    names = [Path(path).name for path in config.data.data_path]
    known = [PUBLISHED_SAMPLES.get(name) for name in names]
    total = sum(known) if known and None not in known else None
    hallucinated = 1.0 if config.objective.contrastive_weight > 0 else 0.0
    if config.data.version == "plain":
        return Samples(
            num_samples=total, image_share=1.0, text_tokens=20, target_tokens=19, pair_share=1.0, caption_tokens=20,
            hallucinated_per_pair=hallucinated,
        )  # fmt: skip
    return Samples(
        num_samples=total, image_share=0.94, text_tokens=330, target_tokens=150,
        pair_share=0.5 if config.data.contrastive_data_path else 0.0, caption_tokens=20,
        hallucinated_per_pair=hallucinated,
    )  # fmt: skip


@dataclass(frozen=True)
class Segments:
    """`count` segments of `length` rows."""

    length: float
    count: float
    autograd: bool
    """Whether anything is kept for a backward pass through the LLM."""

    @property
    def rows(self) -> float:
        return self.length * self.count


@dataclass(frozen=True, kw_only=True)
class PackShape:
    """One micro-batch, in averages (or exactly, made from a real one)."""

    segments: tuple[Segments, ...]
    images: float
    image_rows: float
    """Rows that take an image feature."""
    target_rows: float
    pairs: float
    hallucinated: float

    @property
    def rows(self) -> float:
        return sum(part.rows for part in self.segments)

    @property
    def autograd_rows(self) -> float:
        return sum(part.rows for part in self.segments if part.autograd)

    @property
    def eos_rows(self) -> float:
        return 2 * self.pairs + self.hallucinated

    @property
    def read_rows(self) -> float:
        """Rows whose last hidden state anything reads."""
        return min(self.target_rows + self.eos_rows, self.rows)


def pack_shape(
    config: RunConfig, model: ModelConfig, samples: Samples, micro_batch_size: int, rules: StepRules = STEP
) -> PackShape:
    """The average micro-batch of `micro_batch_size` samples (see `data.packing` for the order of its segments)."""
    visual = model.vision.num_patches
    images, pairs = samples.image_share * micro_batch_size, samples.pair_share * micro_batch_size
    if rules.drops_unused_pairs and config.objective.contrastive_weight == 0:
        pairs = 0.0
    hallucinated = pairs * samples.hallucinated_per_pair
    dialogue = min(samples.text_tokens + samples.image_share * visual, config.data.model_max_length)
    prefix = 0
    if config.objective.contrastive_image_context == "prompt":
        prefix = 1 if config.data.version == "plain" else 40  # BOS, or the system prompt and `USER: ` behind it
    shared = rules.shared_image_prefix and config.objective.contrastive_image_context == "prompt"
    text_autograd = not (rules.text_without_autograd and config.model.freeze_LM)
    return PackShape(
        segments=(
            Segments(dialogue, micro_batch_size, True),
            Segments(1 if shared else prefix + visual + 1, pairs, True),
            Segments(samples.caption_tokens, pairs + hallucinated, text_autograd),
        ),
        images=images,
        image_rows=visual * (images if shared else images + pairs),
        target_rows=samples.target_tokens * micro_batch_size,
        pairs=pairs,
        hallucinated=hallucinated,
    )
