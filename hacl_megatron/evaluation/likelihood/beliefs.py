"""What a model makes of each caption and each of its twins: how likely it finds it, how near to the image.

samples ─┬ Likelihoods (`preference`) ─┐
         └ Retrieval (`retrieval`) ────┴─TaskRunner→ records ─→ {sample: Beliefs}, and the scores of the tasks

A person who looks at a sample sees by it which hallucinations the model believes (tools/inspect_data.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from hacl_megatron.assemble.loaded_model import load_model
from hacl_megatron.assemble.processes import joined_processes
from hacl_megatron.checkpoint.convert.hf_to_megatron import drawn_by_conversion
from hacl_megatron.checkpoint.hf.import_weights import HEADS_FILE
from hacl_megatron.checkpoint.run.folder import assets_of, find_checkpoint
from hacl_megatron.config.run import RunConfig
from hacl_megatron.data.encoding import EncodedSample, EncodingSettings
from hacl_megatron.data.manifest import Sample
from hacl_megatron.data.templates import check_template
from hacl_megatron.data.tokenizer import load_tokenizer
from hacl_megatron.evaluation.likelihood.preference import Preference
from hacl_megatron.evaluation.likelihood.retrieval import Retrieval
from hacl_megatron.evaluation.likelihood.task import AnswerLikelihood, ItemOutput, ManifestTask
from hacl_megatron.evaluation.likelihood.task_run import TaskRunner, from_text
from hacl_megatron.evaluation.scores import Scores

SUM, PER_TOKEN, COSINE = "sum", "per token", "cosine"
"""By what a caption and a twin are compared, in this order."""


@dataclass(frozen=True, kw_only=True)
class Belief:
    """What the model makes of one text behind an image."""

    likelihood: AnswerLikelihood | None = None
    cosine: float | None = None
    """Between the embeddings of the text and of the image."""

    @property
    def values(self) -> dict[str, float]:
        """By `SUM`, `PER_TOKEN`, `COSINE`, those that there are."""
        found = {}
        if self.likelihood is not None:
            found = {SUM: self.likelihood.log_likelihood, PER_TOKEN: self.likelihood.per_token}
        return found if self.cosine is None else {**found, COSINE: self.cosine}


@dataclass(kw_only=True)
class Beliefs:
    """Of one sample."""

    caption: Belief = field(default_factory=Belief)
    """Of a preference record the chosen answer."""
    twins: dict[str, Belief] = field(default_factory=dict)
    """By the texts of its hallucinated captions, or rejected answers, that differ from the caption in tokens."""
    reasons: list[str] = field(default_factory=list)
    """Why something could not be measured."""

    def margins(self, text: str) -> dict[str, float]:
        """Caption minus twin by each measure; below 0 the model believes the twin. Empty for a text that is no twin."""
        ours, theirs = self.caption.values, self.twins.get(text, Belief()).values
        return {measure: ours[measure] - value for measure, value in theirs.items() if measure in ours}

    def smallest_margins(self) -> dict[str, float]:
        """By each measure, of all twins."""
        smallest: dict[str, float] = {}
        for text in self.twins:
            for measure, value in self.margins(text).items():
                smallest[measure] = min(value, smallest.get(measure, value))
        return smallest


class Likelihoods(Preference):
    """`Preference`, also of captions without twins and of preference records of one question; its records tell the
    `texts` of the twins."""

    needs = "one image and a caption, or one question with a rejected answer"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._texts: dict[int, list[str]] = {}
        super().__init__(*arguments, **options)

    def takes(self, sample: Sample) -> bool:
        rejected = sample.rejected_answers and len(sample.conversations) == 2
        return len(sample.images) == 1 and (len(sample.pairs) == 1 or bool(rejected))

    def texts(self, sample: Sample) -> tuple[str, str, tuple[str, ...]]:
        if sample.pairs:
            return super().texts(sample)
        (_, question), (_, chosen) = sample.conversations
        return question, chosen, sample.rejected_answers

    def encode(self, key: int, size: tuple[int, int]) -> list[EncodedSample]:
        caption, different = self.answers(key, size)
        self._texts[key] = [text for text, _ in different]
        return [caption, *(twin for _, twin in different)]

    def measured(self, key: int, output: ItemOutput) -> dict[str, Any]:
        return {**super().measured(key, output), "texts": self._texts.pop(key)}

    def score(self, records: Sequence[dict[str, Any]]) -> Scores:
        return super().score([record for record in records if record.get("texts")])


def beliefs(
    source: Path, config: RunConfig, samples: Sequence[Sample], *, batch_size: int
) -> tuple[dict[int, Beliefs], list[Scores], str | None] | None:
    """Runs the checkpoint over the samples, forward alone, at the layout of `config`; every rank calls it.

    Args:
        source, config: as `assemble.loaded_model.forward_config` gives them.
        batch_size: samples in a pack.

    Returns:
        On rank 0 what it makes of each sample that has a caption, by its place in `samples`; the scores of caption
        preference and retrieval over them; and why there are no cosines, or None. Elsewhere None.

    Raises:
        ValueError: none of the samples has a caption, or the model's numbers are not finite.
    """
    settings, no_heads = EncodingSettings.of(config), why_no_heads(source)
    if not any(sample.rejected_answers or sample.pairs for sample in samples):
        raise ValueError(
            f"--load: none of the {len(samples)} samples to be shown has a caption or a rejected answer, whose "
            "likelihood it is for; choose others, or leave --load out"
        )
    with joined_processes(config) as run:
        tasks: dict[type[ManifestTask], ManifestTask | None] = {Likelihoods: None}
        if no_heads is None and any(len(sample.images) == len(sample.pairs) == 1 for sample in samples):
            tasks[Retrieval] = None
        if run.reads_data:
            tokenizer = load_tokenizer(str(assets_of(source)))
            check_template(config.data.version, tokenizer)
            tasks = {kind: kind(samples, tokenizer, settings) for kind in tasks}
        runner = TaskRunner.of(load_model(source, run), run, batch_size=batch_size)
        records = {kind: _run(runner, kind.name, task) for kind, task in tasks.items()}
        runner.close()
        if dist.get_rank() != 0:
            return None
        scores = [tasks[kind].score(found) for kind, found in records.items()]
    return _by_sample(records, samples), scores, no_heads


def why_no_heads(source: Path) -> str | None:
    """Why the checkpoint's contrastive heads, which nobody has trained, say nothing; None where they do."""
    own = find_checkpoint(source)
    if own is None and not (source / HEADS_FILE).is_file():
        return f"no cosines: {source.name} has no {HEADS_FILE}"
    if own is not None and any("vision_projector" in name for name in drawn_by_conversion(own)):
        return "no cosines: its contrastive heads were drawn at random when it was converted"
    return None


def _run(runner: TaskRunner, name: str, task: ManifestTask | None) -> list[dict[str, Any]] | None:
    if task is None:
        return runner.run(None)
    with tqdm(total=len(task.item_keys()), desc=name, unit="sample", delay=2) as bar:
        return runner.run(task, keep=lambda record: bar.update())


def _by_sample(
    records: Mapping[type[ManifestTask], list[dict[str, Any]]], samples: Sequence[Sample]
) -> dict[int, Beliefs]:
    likelihoods = {record["key"]: record for record in records[Likelihoods]}
    embeddings = {record["key"]: record for record in records.get(Retrieval, ())}
    found = {}
    for key in likelihoods.keys() | embeddings.keys():
        said, seen = likelihoods.get(key, {}), embeddings.get(key, {})
        errors = {part["error"]: None for part in (said, seen) if "error" in part}
        one = found[key] = Beliefs(reasons=[f"not scored: {reason}" for reason in errors])
        likely, twins_likely = None, {}
        if "caption" in said:
            likely = AnswerLikelihood(**said["caption"])
            twins_likely = {
                text: AnswerLikelihood(**twin) for text, twin in zip(said["texts"], said["hallucinated"], strict=True)
            }
        near, twins_near = None, {}
        if "image_embedding" in seen:
            image = from_text(seen["image_embedding"])
            near = float(image @ from_text(seen["caption_embedding"]))
            (pair,) = samples[key].pairs
            keyed = zip(pair.hallucinated, seen["hallucinated_keys"], seen["hallucinated_embeddings"], strict=True)
            twins_near = {text: float(image @ from_text(row)) for text, own, row in keyed if own != seen["caption_key"]}
        one.caption = Belief(likelihood=likely, cosine=near)
        one.twins = {
            text: Belief(likelihood=twins_likely.get(text), cosine=twins_near.get(text))
            for text in {**twins_likely, **twins_near}
        }
    return found
