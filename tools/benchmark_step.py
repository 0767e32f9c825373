"""Time and memory of one optimiser step: this package against HACL written plainly on transformers, and variants.

    python tools/benchmark_step.py                                  # the README's table: some ten minutes, 2 cores
    python tools/benchmark_step.py --stage finetune --profile
    python tools/benchmark_step.py --variant "no recompute=--some-flag value"

The other side is `tests/reference_hacl.py` (four padded passes, as the released code has them), so this runs from a
clone. Both start from one random LLaVA of the given sizes, see the same samples, and take whole optimiser steps in
fp32 on the CPU with as many threads. Each variant has a process of its own; they take turns step by step, so that
whatever else the machine does meets all of them alike. Losses of the first step must agree.

Ratios are medians over paired repetitions of time(plain) / time(variant), by the clock and in CPU seconds of all
threads: on a busy machine the second is the steadier. The bound is the ratio of the FLOPs that the two need
(`tools/benchmark_flops.py`). Peak memory is the high-water of RssAnon during the second step of a fresh process, above
its level before, when all that the first step freed has been handed back to the system.
"""

import argparse
import ctypes
import gc
import importlib.util
import multiprocessing
import os
import re
import shlex
import statistics
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hacl_megatron.config.console import exit_with_error

ROOT = Path(__file__).resolve().parents[1]
PLAIN = "plain"
BOS, EOS, NEWLINE, FIRST_WORD = 1, 2, 13, 20
PREFIXES = {"plain": 1, "v1": 35}
"""Rows before the image: BOS, or the system prompt and "USER:" too (Vicuna's tokenizer)."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way for this package to take the step."""

    flags: tuple[str, ...] = ()
    """Flags of the trainer."""
    without: tuple[str, ...] = ()
    """`benchmark_flops.FEATURES` that these flags switch off, for the FLOP count."""


VARIANTS: dict[str, Variant] = {"ours": Variant()}
"""Variants that always run; `--variant` adds more."""


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


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("model")
    model.add_argument("--hidden", type=int, default=512)
    model.add_argument("--layers", type=int, default=8)
    model.add_argument("--heads", type=int, default=8)
    model.add_argument("--ffn", type=int, default=1376)
    model.add_argument("--vocab", type=int, default=32000)
    model.add_argument("--vision-hidden", type=int, default=256)
    model.add_argument("--vision-layers", type=int, default=6)
    model.add_argument("--vision-heads", type=int, default=4)
    model.add_argument("--image", type=int, default=336)
    model.add_argument("--patch", type=int, default=14)
    data = parser.add_argument_group("data")
    data.add_argument("--pairs", type=int, default=8, help="samples of the micro-batch, which is the global batch")
    data.add_argument("--hallucinated", type=int, default=1, help="hallucinated captions a pair")
    data.add_argument("--caption-tokens", type=int, nargs=2, default=(8, 40), metavar=("LEAST", "MOST"))
    parser.add_argument("--contexts", nargs="+", choices=("image", "prompt"), default=["image", "prompt"])
    parser.add_argument("--stage", choices=("pretrain", "finetune"), default="pretrain")
    parser.add_argument("--variant", action="append", default=[], metavar="NAME=FLAGS", help="trainer flags to compare")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-memory", action="store_true", help="leave the memory out")
    parser.add_argument("--profile", action="store_true", help="also show where each variant's time goes")
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------ model and samples


def write_model(folder: Path, args: argparse.Namespace) -> None:
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
    import random

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


def lengths_of(work: Work, texts: list[Texts], visual: int):
    """The samples' lengths, for the FLOP counts."""
    from benchmark_flops import Lengths

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


def package_side(work: Work, flags: tuple[str, ...]) -> TakeStep:
    """This package's step, built as `train.py` does and driven as `training/loop.py` does."""
    import warnings

    warnings.filterwarnings("ignore")

    from hacl_megatron.checkpoint.hf_config import read_model_config
    from hacl_megatron.config.checks import Layout
    from hacl_megatron.config.run import parse_run_config, with_architecture
    from hacl_megatron.platform.processes import start_platform
    from hacl_megatron.training import setup
    from hacl_megatron.training.step import Step

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
    groups = setup.initialize_parallelism(config, layout)
    module = setup.build_module(config, architecture, layout, groups, device)
    setup.load_pretrained(module, config, architecture, layout)
    module.load_state_dict(
        {f"heads.{name}": value for name, value in _heads(work, architecture.language.hidden_size).items()},
        strict=False,
    )
    trainee = setup.build_trainee(module, config, groups, device, train_iters=1000)
    step = Step(
        trainee.model,
        trainee.optimizer,
        config.objective,
        vocab_size=architecture.language.vocab_size,
        groups=groups,
        device=device,
    )
    micro_batches = [batch.to(device) for batch in _packed(work, config, architecture)]

    def take_step() -> dict[str, float]:
        counts = step.count(micro_batches)
        metrics = step.forward_backward(micro_batches, counts)
        assert step.update(loss_is_finite=True).applied
        trainee.scheduler.step(increment=1)
        return {
            "lm loss": metrics.lm_loss,
            "contrastive loss i2t": metrics.contrastive_i2t,
            "contrastive loss t2i": metrics.contrastive_t2i,
        }

    return take_step


def _packed(work: Work, config: Any, architecture: Any) -> list[Any]:
    """The samples as the loader packs them."""
    import numpy as np

    from hacl_megatron.data.conversation import IGNORE, IMAGE, EncodedSample, rows_key
    from hacl_megatron.data.packing import PackSlot, pack

    visual = architecture.vision.num_patches
    texts, pixels = draw_samples(work, architecture.language.vocab_size, architecture.vision.image_size)
    slots = []
    for index, text in enumerate(texts):
        targets = [*text.caption, NEWLINE]
        before = text.prefix if config.objective.contrastive_image_context == "prompt" else []
        captions = [np.array([BOS, *words, EOS]) for words in (text.caption, *text.hallucinated)]
        encoded = EncodedSample(
            dialogue=np.array([*text.prefix, *[IMAGE] * visual, *targets]),
            labels=np.array([*[IGNORE] * (len(text.prefix) + visual), *targets]),
            has_image=True,
            image_segment=np.array([*before, *[IMAGE] * visual, EOS]),
            caption_segment=captions[0],
            hallucinated_segments=tuple(captions[1:]),
            caption_key=rows_key(captions[0]),
            hallucinated_keys=tuple(map(rows_key, captions[1:])),
            truncated=False,
            tokenization_mismatch=False,
        )
        slots.append(PackSlot(sample_id=index, encoded=encoded, image_key=index))
    return [pack(slots, pixels, visual_tokens=visual, pad_multiple=1)]


def _heads(work: Work, hidden: int) -> dict[str, Any]:
    """Equal contrastive heads for both sides."""
    import torch

    generator = torch.Generator().manual_seed(work.seed + 1)
    return {
        f"{name}.{key}": torch.randn(shape, generator=generator) / hidden**0.5
        for name in ("vision_projector", "text_projector")
        for key, shape in (("weight", (hidden // 4, hidden)), ("bias", (hidden // 4,)))
    }


# ------------------------------------------------------------------------------------------------- a variant's process


def serve(pipe: Connection, work: Work, name: str, flags: tuple[str, ...]) -> None:
    """Build one side, then answer requests: `step` (seconds, CPU seconds, losses), `trim`, `profile`, None (leave)."""
    try:
        import torch

        torch.set_num_threads(work.threads)
        take_step = plain_side(work) if name == PLAIN else package_side(work, flags)
        pipe.send(None)
        while (request := pipe.recv()) is not None:
            if request == "step":
                wall, cpu = time.perf_counter(), time.process_time()
                losses = take_step()
                pipe.send((time.perf_counter() - wall, time.process_time() - cpu, losses))
            elif request == "trim":
                gc.collect()
                ctypes.CDLL(None).malloc_trim(0)
                pipe.send(None)
            else:
                pipe.send(profile(take_step))
    except BaseException as error:
        pipe.send(RuntimeError(f"{name}: {type(error).__name__}: {error}\n{traceback.format_exc()}"))


class Process:
    """A variant in a process of its own, idle between requests."""

    def __init__(self, work: Work, name: str, flags: tuple[str, ...]) -> None:
        before = dict(os.environ)
        os.environ["OMP_NUM_THREADS"] = str(work.threads)  # read when torch starts
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("spawn").Process(
            target=serve, args=(theirs, work, name, flags), daemon=True
        )
        self.process.start()
        os.environ.clear()
        os.environ.update(before)
        theirs.close()
        self._receive()

    def ask(self, request: str, meanwhile: Callable[[], None] | None = None) -> Any:
        """The answer to `request`; `meanwhile` is called again and again until it comes."""
        self.pipe.send(request)
        while meanwhile is not None and not self.pipe.poll(0.001):
            meanwhile()
        return self._receive()

    def anonymous_bytes(self) -> int:
        """Resident anonymous memory now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join()

    def _receive(self) -> Any:
        try:
            answer = self.pipe.recv()
        except EOFError:
            raise RuntimeError(f"a variant's process ended with exit code {self.process.exitcode}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


# What an operator counts as, by the first pattern its name matches.
GROUPS: dict[str, str] = {
    "matrix products": r"^aten::(mm|addmm|bmm|matmul|linear|mkldnn\w*|_?convolution|dot)$",
    "attention": r"scaled_dot_product",
    "cross entropy": r"log_?softmax|nll_loss|logsumexp|CrossEntropy|^aten::(exp|log|max|scatter\w*)$",
    "norms": r"norm|^aten::(rsqrt|pow|mean)$",
    "elementwise": r"^aten::(add|sub|mul|div|addcmul|addcdiv|lerp)_?$"
    r"|^aten::(neg|silu|gelu|sigmoid|cos|sin|sqrt|sum)(_backward)?$|_foreach|fused_adam",
    "copies and zeros": r"^aten::(copy_|clone|cat|stack|index\w*|gather|masked_\w+|fill_|zero_|zeros\w*|where|empty\w*)$",
}


def profile(take_step: TakeStep) -> tuple[dict[str, float], list[tuple[str, float, int]]]:
    """Seconds of one step by group of operators, and the operators that take most: name, seconds, calls."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CPU]) as recorded:
        started = time.perf_counter()
        take_step()
        wall = time.perf_counter() - started
    groups: dict[str, float] = defaultdict(float)
    operators = []
    for event in recorded.key_averages():
        seconds = event.self_cpu_time_total / 1e6
        group = next((group for group, pattern in GROUPS.items() if re.search(pattern, event.key)), "other")
        groups[group] += seconds
        operators.append((event.key, seconds, event.count))
    groups["other"] += max(wall - sum(groups.values()), 0.0)  # Python between the operators
    return dict(groups), sorted(operators, key=lambda entry: -entry[1])[:25]


# -------------------------------------------------------------------------------------------------------- measurements


def measure_times(work: Work, variants: dict[str, Variant], repetitions: int, profiled: bool):
    """(Seconds, CPU seconds) of every repetition by variant, interleaved, and (if asked) each variant's profile."""
    processes: dict[str, Process] = {}
    try:
        for name, variant in {PLAIN: Variant(), **variants}.items():
            processes[name] = Process(work, name, variant.flags)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in processes}
        first = {name: process.ask("step")[2] for name, process in processes.items()}  # also warms up
        _check_agreement(first)
        for repetition in range(repetitions):
            order = list(processes) if repetition % 2 == 0 else list(reversed(processes))
            for name in order:
                times[name].append(processes[name].ask("step")[:2])
        profiles = {name: process.ask("profile") for name, process in processes.items()} if profiled else {}
        return times, profiles
    finally:
        for process in processes.values():
            process.process.kill()


def _check_agreement(losses: dict[str, dict[str, float]]) -> None:
    for name, found in losses.items():
        for tag, value in found.items():
            expected = losses[PLAIN][tag]
            if tag in losses[PLAIN] and abs(value - expected) > 1e-4 * max(1.0, abs(expected)):
                raise RuntimeError(f"{name} computes another {tag} than {PLAIN}: {value} and {expected}")


def measure_memory(work: Work, name: str, variant: Variant) -> int:
    """Bytes by which a step's high-water exceeds the level before it: the second step's, optimiser state in place."""
    process = Process(work, name, variant.flags)
    process.ask("step")
    process.ask("trim")
    before = process.anonymous_bytes()
    highest = before

    def watch() -> None:
        nonlocal highest
        highest = max(highest, process.anonymous_bytes())

    process.ask("step", watch)
    process.close()
    return highest - before


# -------------------------------------------------------------------------------------------------------------- report


def benchmark(args: argparse.Namespace) -> None:
    from benchmark_flops import package_flops, plain_flops

    from hacl_megatron.checkpoint.hf_config import read_model_config

    if not (ROOT / "tests" / "reference_hacl.py").exists():
        raise ValueError(f"{ROOT} holds no tests/reference_hacl.py, the plain implementation: run this from a clone")
    variants = {**VARIANTS, **dict(map(_variant, args.variant))}
    table = []
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), args)
        architecture = read_model_config(folder)
        for context in args.contexts:
            work = Work(
                folder=folder, context=context, stage=args.stage, threads=args.threads, pairs=args.pairs,
                hallucinated=args.hallucinated, shortest=args.caption_tokens[0], longest=args.caption_tokens[1],
                seed=args.seed,
            )  # fmt: skip
            texts, _ = draw_samples(work, args.vocab, 1)
            lengths = lengths_of(work, texts, architecture.vision.num_patches)
            settings = {"prompt": context == "prompt", "trained": not work.frozen}
            flops = {PLAIN: plain_flops(architecture, lengths, **settings)}
            for name, variant in variants.items():
                flops[name] = package_flops(architecture, lengths, **settings, without=variant.without)
            times, profiles = measure_times(work, variants, args.repetitions, args.profile)
            peaks = {}
            if not args.no_memory:
                peaks = {name: measure_memory(work, name, variants.get(name, Variant())) for name in times}
            rows = sum(lengths.dialogues) + sum(lengths.captions) + sum(lengths.hallucinated)
            print(f"\n{context} context, {args.stage}: {rows:,} tokens and {len(texts)} images a step, without padding")
            _print_flops(flops)
            for name, found in profiles.items():
                _print_profile(name, *found, sum(flops[name].values()))
            table += [_row(context, name, times, peaks, flops) for name in times]
    header = ("image context", "step", "s", "plain / this", "in CPU s", "bound", "of the bound", "GFLOP")
    header += ("peak MiB", "of plain's")
    print(f"\n| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    print("\n".join(table))


def _variant(text: str) -> tuple[str, Variant]:
    name, found, flags = text.partition("=")
    if not found or not name:
        raise ValueError(f"--variant {text!r} is not of the form NAME=FLAGS")
    return name, Variant(flags=tuple(shlex.split(flags)))


def _row(context: str, name: str, times: dict, peaks: dict, flops: dict) -> str:
    pairs = list(zip(times[PLAIN], times[name], strict=True))
    ratio, cpu_ratio = (statistics.median(plain[kind] / own[kind] for plain, own in pairs) for kind in (0, 1))
    total = {key: sum(parts.values()) for key, parts in flops.items()}
    bound = total[PLAIN] / total[name]
    cells = [context, name, f"{statistics.median(wall for wall, _ in times[name]):.2f}"]
    if name == PLAIN:
        cells += ["1", "1", "1", ""]
    else:
        cells += [f"{ratio:.2f}", f"{cpu_ratio:.2f}", f"{bound:.2f}", f"{ratio / bound:.0%}"]
    cells.append(f"{total[name] / 1e9:.0f}")
    cells += [f"{peaks[name] / 2**20:.0f}", f"{peaks[name] / peaks[PLAIN]:.0%}"] if peaks else ["", ""]
    return f"| {' | '.join(cells)} |"


def _print_flops(flops: dict[str, dict[str, float]]) -> None:
    parts = list(flops[PLAIN])
    width = max(map(len, flops))
    print("GFLOP".ljust(width), *(f"{part:>14}" for part in (*parts, "sum")))
    for name, counted in flops.items():
        print(
            name.ljust(width),
            *(f"{counted[part] / 1e9:14.1f}" for part in parts),
            f"{sum(counted.values()) / 1e9:14.1f}",
        )


def _print_profile(name: str, groups: dict[str, float], operators: list[tuple[str, float, int]], flops: float) -> None:
    total = sum(groups.values())
    print(f"\n{name}: {total:.2f} s under the profiler, {flops / total / 1e9:.1f} GFLOP/s")
    for group, seconds in sorted(groups.items(), key=lambda item: -item[1]):
        print(f"  {group:28} {seconds:7.3f} s {seconds / total:6.1%}")
    for operator, seconds, calls in operators:
        print(f"    {operator:60} {seconds:7.3f} s {calls:6} calls")


if __name__ == "__main__":
    try:
        benchmark(parse())
    except (ValueError, OSError) as error:
        exit_with_error(error)
