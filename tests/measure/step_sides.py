"""The two sides of `measure_step.py`: one random model, one set of samples, and a step of each over them."""

import importlib.util
import random
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.measure.step_flops import Lengths

ROOT = Path(__file__).resolve().parents[2]
BOS, EOS, NEWLINE, FIRST_WORD = 1, 2, 13, 20
PREFIXES = {"plain": 1, "v1": 35}
"""Rows before the image: BOS, or the system prompt and "USER:" too (Vicuna's tokenizer)."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every process is told: sizes, data and settings."""

    folder: str
    context: str
    stage: str
    threads: int
    pairs: int
    hallucinated: int
    shortest: int
    longest: int
    seed: int

    @property
    def frozen(self) -> bool:
        return self.stage == "pretrain"

    @property
    def prefix(self) -> int:
        return PREFIXES["plain" if self.frozen else "v1"]


def write_model(folder: Path, args: Namespace) -> None:
    """A random LLaVA in Hugging Face's layout; both sides load it."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(args.seed)
    text = LlamaConfig(
        hidden_size=args.hidden, intermediate_size=args.ffn, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, vocab_size=args.vocab, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=args.vision_hidden, intermediate_size=4 * args.vision_hidden, projection_dim=args.vision_hidden,
        num_hidden_layers=args.vision_layers, num_attention_heads=args.vision_heads, image_size=args.image,
        patch_size=args.patch,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=args.vocab - 1, tie_word_embeddings=False,
        image_seq_length=(args.image // args.patch) ** 2,
    )  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(folder)


@dataclass(frozen=True)
class Texts:
    """Token ids of one sample, without BOS, EOS and image."""

    prefix: list[int]
    caption: list[int]
    hallucinated: list[list[int]]


def draw_samples(work: Work, vocab: int, image_size: int) -> tuple[list[Texts], Any]:
    """Random captions, hallucinated twins with a third of their tokens changed, and pixels [pairs, 3, H, W]."""
    import torch

    rng = random.Random(work.seed)

    def words(count: int) -> list[int]:
        return [rng.randrange(FIRST_WORD, vocab - 1) for _ in range(count)]

    prefix = [BOS, *words(work.prefix - 1)]
    texts = []
    for _ in range(work.pairs):
        caption = words(rng.randint(work.shortest, work.longest))
        twins = [[words(1)[0] if rng.random() < 1 / 3 else word for word in caption] for _ in range(work.hallucinated)]
        texts.append(Texts(prefix, caption, twins))
    generator = torch.Generator().manual_seed(work.seed)
    return texts, torch.randn(work.pairs, 3, image_size, image_size, generator=generator)


def lengths_of(work: Work, texts: list[Texts], visual: int) -> Lengths:
    """The samples' lengths, for the FLOP counts."""
    return Lengths(
        dialogues=[work.prefix + visual + len(text.caption) + 1 for text in texts],
        targets=[len(text.caption) + 1 for text in texts],
        captions=[len(text.caption) + 2 for text in texts],
        hallucinated=[len(twin) + 2 for text in texts for twin in text.hallucinated],
        image_begin=work.prefix,
        visual=visual,
    )


# ---------------------------------------------------------------------------------------------------- the two sides

TakeStep = Callable[[], dict[str, float]]
"""Takes one optimiser step over the micro-batch; returns its losses."""


def plain_side(work: Work) -> TakeStep:
    """The plain implementation."""
    import torch

    path = ROOT / "tests" / "reference_hacl.py"
    spec = importlib.util.spec_from_file_location("reference_hacl", path)
    reference = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = reference
    spec.loader.exec_module(reference)

    torch.manual_seed(work.seed)
    model = reference.ReferenceHacl.from_folder(
        Path(work.folder), freeze_language_model=work.frozen, image_context=work.context
    )
    model.load_state_dict(_heads(work, model.llava.config.text_config.hidden_size), strict=False)
    config = model.llava.config
    visual = config.image_seq_length
    texts, pixels = draw_samples(work, config.text_config.vocab_size, config.vision_config.image_size)
    samples = []
    for index, text in enumerate(texts):
        targets = [*text.caption, NEWLINE]
        rows = torch.tensor([*text.prefix, *[config.image_token_id] * visual, *targets])
        labels = torch.full_like(rows, reference.IGNORE)
        labels[-len(targets) :] = torch.tensor(targets)
        samples.append(
            reference.Sample(
                dialogue=rows,
                labels=labels,
                pixel_values=pixels[index],
                image_id=index,
                caption=torch.tensor([BOS, *text.caption]),
                hallucinated=[torch.tensor([BOS, *twin]) for twin in text.hallucinated],
            )
        )
    trainer = reference.ReferenceTrainer(model, lr=1e-3, train_iters=1000)
    return lambda: trainer.step([samples])


def package_side(work: Work, flags: tuple[str, ...], without: tuple[str, ...] = ()) -> TakeStep:
    """This package's step, built as `train.py` does and driven as `training/loop.py` does.

    `without`: names of `tests.measure.step_flops.FEATURES` to switch off.
    """
    warnings.filterwarnings("ignore")

    from hacl_megatron.assemble.module import build_module, load_pretrained
    from hacl_megatron.assemble.processes import initialize_parallelism
    from hacl_megatron.assemble.run import Run
    from hacl_megatron.checkpoint.hf.config_read import read_model_config
    from hacl_megatron.config.layout import Layout
    from hacl_megatron.config.run import parse_run_config, with_architecture
    from hacl_megatron.platform.processes import start_platform
    from hacl_megatron.training.step import Step
    from hacl_megatron.training.trainee import build_trainee

    config = parse_run_config(
        [
            *("--pretrained-checkpoint", work.folder, "--device", "cpu", "--lr", "1e-3"),
            *("--micro-batch-size", str(work.pairs), "--contrastive-image-context", work.context),
            *(["--freeze-LM"] if work.frozen else []),
            *flags,
        ]
    )
    config = with_architecture(config, read_model_config(work.folder))
    architecture = config.architecture
    layout = Layout(
        world_size=1, tp=1, pp=1, dp=1, micro_batch_size=work.pairs, global_batch_size=work.pairs, num_micro_batches=1
    )
    device = start_platform("cpu")
    groups = initialize_parallelism(config, layout)
    module = build_module(config, groups, device)
    load_pretrained(module, config)
    module.load_state_dict(
        {f"heads.{name}": value for name, value in _heads(work, architecture.language.hidden_size).items()},
        strict=False,
    )
    trainee = build_trainee(module, config, train_iters=1000)
    module.read_rows_only = "last layer for read rows" not in without
    step = Step(Run(config=config, layout=layout, groups=groups, device=device), trainee)
    micro_batches = [_packed(work, config, architecture, without)]

    def take_step() -> dict[str, float]:
        counts = step.count(micro_batches)
        losses = step.forward_backward(micro_batches, counts, contrastive_weight=config.objective.contrastive_weight)
        metrics, result = step.update(losses)
        assert result.applied
        trainee.scheduler.step(increment=1)
        return {
            "lm loss": metrics.lm_loss,
            "contrastive loss i2t": metrics.contrastive_i2t,
            "contrastive loss t2i": metrics.contrastive_t2i,
            **({"preference loss": metrics.preference_loss} if metrics.weights.preference else {}),
        }

    return take_step


def _packed(work: Work, config: Any, architecture: Any, without: tuple[str, ...]) -> Any:
    """The samples as the loader packs them."""
    from dataclasses import replace

    import numpy as np

    from hacl_megatron.batch import MicroBatch, Parts
    from hacl_megatron.data.encoding import IGNORE, IMAGE, EncodedPair, EncodedSample
    from hacl_megatron.data.packing import PackSlot, pack
    from hacl_megatron.data.preferences import rejected_answer
    from hacl_megatron.training.packs import pack_plan

    visual = architecture.visual_tokens
    texts, pixels = draw_samples(work, architecture.language.vocab_size, architecture.vision.image_size)
    slots = []
    for index, text in enumerate(texts):
        targets = [*text.caption, NEWLINE]
        before = text.prefix if config.objective.contrastive_image_context == "prompt" else []
        captions = [np.array([BOS, *words, EOS]) for words in (text.caption, *text.hallucinated)]
        before_answer = [*text.prefix, *[IMAGE] * visual]
        ignored = [IGNORE] * len(before_answer)
        dialogue, labels = np.array([*before_answer, *targets]), np.array([*ignored, *targets])
        rejected = []
        for twin in text.hallucinated if config.preference.preference_loss != "none" else ():
            answer = [*twin, NEWLINE]
            whole = {"limit": 1 << 30, "whole": config.preference.has_reference}
            rows, targets_of_twin = np.array([*before_answer, *answer]), np.array([*ignored, *answer])
            rejected.append(rejected_answer(dialogue, labels, rows, targets_of_twin, **whole))
        pair = EncodedPair(
            image=0,
            image_segment=np.array([*before, *[IMAGE] * visual, EOS]),
            caption_segment=captions[0],
            hallucinated_segments=tuple(captions[1:]),
        )
        encoded = EncodedSample(
            dialogue=dialogue,
            labels=labels,
            rejected=tuple(rejected),
            images=(architecture.image_layout.rows(None, alone=True),),
            pairs=(pair,),
            truncated=False,
            tokenization_mismatch=False,
        )
        references = np.full((len(rejected), 2), -300.0) if config.preference.has_reference else None
        slots.append(PackSlot(sample_id=index, encoded=encoded, image_keys=(index,), references=references))
    plan = pack_plan(config, 1, with_gradients=True)
    if "text without autograd" in without:
        plan = replace(plan, main=replace(plan.main, texts=True), ahead=None)
    if "shared prompt of twins" in without:
        plan = replace(plan, main=replace(plan.main, preferences="segment"))
    if "shared prefix" in without:
        plan = replace(plan, main=replace(plan.main, images="segment"))

    def packed(parts: Parts, images: Any) -> Any:
        return pack(slots, images, visual_tokens=visual, pad_multiple=1, parts=parts)

    ahead = None if plan.ahead is None else packed(plan.ahead, pixels[:0])
    return MicroBatch(main=packed(plan.main, pixels), ahead=ahead)


def _heads(work: Work, hidden: int) -> dict[str, Any]:
    """Equal contrastive heads for both sides."""
    import torch

    generator = torch.Generator().manual_seed(work.seed + 1)
    return {
        f"{name}.{key}": torch.randn(shape, generator=generator) / hidden**0.5
        for name in ("vision_projector", "text_projector")
        for key, shape in (("weight", (hidden // 4, hidden)), ("bias", (hidden // 4,)))
    }
