"""All twins of a run's data through the weights that it starts from, forward only.

samples with twins ─loader→ packs ─ForwardOnly→ log-likelihoods [P, A] ─→ rank 0: a line a sample, then the file
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import ceil
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from tqdm import tqdm

from hacl_megatron.assemble.forward import ForwardOnly, losses_of_tokens
from hacl_megatron.assemble.run import Run
from hacl_megatron.batch import BadSample, PackedBatch, PackPlan, Parts, StepBatches
from hacl_megatron.config.run import RunConfig
from hacl_megatron.data.loader import StepLoader
from hacl_megatron.data.manifest import Manifest
from hacl_megatron.evaluation.journal import Journal, settings_path
from hacl_megatron.model.hacl import ModelOutput
from hacl_megatron.objective.preference import answer_likelihoods
from hacl_megatron.training.reference.scores import ReferenceScores
from hacl_megatron.training.signals import StoppedEarly

PLAN = PackPlan(main=Parts(images="none", texts=False, preferences="branch"))
"""Dialogues and their rejected answers, as a step packs them."""


class ScoredTwins:
    """One pass over the samples with twins; every rank calls `run`.

    Args:
        open_loader: gives a loader over the sample ids that it is given, packed by `PLAN`.
        beat: called behind each step.
        why_stop: asked behind each step on every rank: what this one wants to stop for, if anything.
    """

    def __init__(
        self,
        run: Run,
        forward: ForwardOnly,
        open_loader: Callable[[list[int]], StepLoader],
        beat: Callable[[], None] = lambda: None,
        why_stop: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.run_, self.forward, self.open_loader = run, forward, open_loader
        self.beat, self.why_stop = beat, why_stop
        self.unusable: list[BadSample] = []
        """On rank 0: samples that gave no scores."""

    def run(
        self,
        sample_ids: list[int],
        identity: Mapping[str, str],
        *,
        path: Path | None,
    ) -> ReferenceScores | None:
        """The scores of `sample_ids`, in `path` and returned, on rank 0; None elsewhere.

        Args:
            sample_ids: those with twins; matters on rank 0 alone, as what follows does.
            path: a killed pass left its lines beside it. None: nothing is kept.

        Raises:
            ValueError: the model's numbers are not finite.
            StoppedEarly: a rank wants to stop; the next pass for `path` goes on behind what this one did.
        """
        first = dist.get_rank() == 0
        with _lines(path if first else None, identity) as (done, keep):
            box = [[sample_id for sample_id in sample_ids if sample_id not in done] if first else None]
            dist.broadcast_object_list(box, src=0)
            (todo,) = box
            loader = self.open_loader(todo) if todo and self.run_.reads_data else None
            bar = tqdm(
                total=len(sample_ids),
                initial=len(done),
                desc="reference",
                unit="sample",
                disable=None if first else True,
            )
            try:
                for _ in range(ceil(len(todo) / self.run_.layout.global_batch_size)):
                    for sample_id, pairs in self._step(None if loader is None else next(loader)).items():
                        keep(sample_id, pairs)
                        done[sample_id] = pairs
                        bar.update()
                    self.beat()
                    self._stop_if_asked()
            finally:
                bar.close()
                if loader is not None:
                    loader.close()
            if not first:
                return None
            scores = ReferenceScores.of(done, identity)
            if path is not None:
                scores.write(path)
        if path is not None:
            _remove_lines(path)
        return scores

    def _stop_if_asked(self) -> None:
        reason = self.why_stop()
        (num_reasons,) = self.run_.groups.sums([reason is not None])
        if num_reasons:
            reasons: list[str | None] = [None] * dist.get_world_size()
            dist.all_gather_object(reasons, reason)
            raise StoppedEarly(next(text for text in reasons if text is not None))

    def _step(self, step: StepBatches | None) -> dict[int, list[list[float]]]:
        """One global batch: each sample's pairs on rank 0, nothing elsewhere."""
        packs = None if step is None else [batch.main for batch in step.micro_batches]
        architecture = self.run_.config.architecture
        collect = partial(
            _likelihoods_of_pack, vocab_size=architecture.language.vocab_size, tp_group=self.run_.groups.tp
        )
        results = self.forward(packs, collect)
        if step is None:
            return {}
        own: dict[int, list[list[float]]] = {}
        for sample_ids, likelihoods in results:
            for sample_id, pair in zip(sample_ids.tolist(), likelihoods.tolist(), strict=True):
                own.setdefault(sample_id, []).append(pair)
        group = self.run_.groups.dp
        gathered = [None] * group.size() if group.rank() == 0 else None
        dist.gather_object((own, step.bad_samples), gathered, dst=dist.get_global_rank(group, 0), group=group)
        found: dict[int, list[list[float]]] = {}
        for of_rank, bad in gathered or []:
            found |= of_rank
            self.unusable += bad
        for sample_id, pairs in found.items():
            if not all(abs(value) < float("inf") for pair in pairs for value in pair):  # NaN neither
                raise ValueError(
                    f"the model's numbers are not finite (NaN or infinity) for sample {sample_id}: the weights that "
                    "the run starts from are damaged"
                )
        return found


def _likelihoods_of_pack(
    output: ModelOutput, batch: PackedBatch, *, vocab_size: int, tp_group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """int64 [P] sample ids and float64 [P, A], on the host; on every tensor-parallel rank of the last stage."""
    if not batch.num_preferences:
        return batch.twin_sample_ids, torch.empty(0, batch.answers_per_twin, dtype=torch.float64)
    losses = losses_of_tokens(output, batch, vocab_size=vocab_size, tp_group=tp_group)
    likelihoods = answer_likelihoods(losses, batch.preference_tokens, batch.preference_lengths, batch.answers_per_twin)
    return batch.twin_sample_ids, likelihoods.double().cpu()


def samples_with_twins(config: RunConfig, *, for_validation: bool) -> list[int]:
    """Manifest indices, ascending, of what a run trains on or, of its first `--eval-iters` batches, validates on."""
    data = config.data
    paths = (data.valid_data_path, []) if for_validation else (data.data_path, data.contrastive_data_path)
    found, first = [], 0
    for some in paths:
        manifest = Manifest.read(some, version=data.version, cache_dir=data.data_cache_dir)
        found += [first + at for at in range(len(manifest)) if any(manifest[at].twin_conversations())]
        first += len(manifest)
    return found


@contextlib.contextmanager
def _lines(path: Path | None, identity: Mapping[str, str]) -> Iterator[tuple[dict, Callable]]:
    """What an earlier pass for the same file has done, by sample, and what keeps more."""
    if path is None:
        yield {}, lambda sample_id, pairs: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with Journal(_lines_path(path), dict(identity), lambda record: record["sample"]) as journal:
        done = {sample_id: record["likelihoods"] for sample_id, record in journal.done.items()}
        yield done, lambda sample_id, pairs: journal.append({"sample": sample_id, "likelihoods": pairs})


def _lines_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.jsonl")


def _remove_lines(path: Path) -> None:
    for leftover in (_lines_path(path), settings_path(_lines_path(path))):
        leftover.unlink(missing_ok=True)
