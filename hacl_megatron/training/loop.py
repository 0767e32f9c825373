"""The training loop: load, step, log, evaluate, save; and when to give up."""

import time
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from hacl_megatron.assemble.run import Run
from hacl_megatron.batch import MicroBatch, StepBatches
from hacl_megatron.config.console import lost_lines
from hacl_megatron.config.lora import Lora
from hacl_megatron.data.loader import StepLoader
from hacl_megatron.platform.device import device_name, memory_in_use
from hacl_megatron.platform.hardware import peak_flops
from hacl_megatron.training.flops import step_flops
from hacl_megatron.training.losses import GlobalCounts, StepMetrics
from hacl_megatron.training.optimizer.schedule import contrastive_weight_at, default_learning_rate
from hacl_megatron.training.reporting.bad_samples import (
    BAD_SAMPLES_FILE,
    UNCOMPARED,
    UntrainedSamples,
    report_bad_samples,
)
from hacl_megatron.training.reporting.metrics import MetricsLog
from hacl_megatron.training.reporting.profiling import ProfileWindow
from hacl_megatron.training.reporting.scalars import loss_scalars, params_norm
from hacl_megatron.training.reporting.status import SAMPLE_KEYS, TrainingStopped
from hacl_megatron.training.reporting.step_time import RankNumbers, rank_scalars
from hacl_megatron.training.saving import Saving
from hacl_megatron.training.signals import StopRequests
from hacl_megatron.training.state import StartingPoint
from hacl_megatron.training.step import Step, UpdateResult
from hacl_megatron.training.trainee import Trainee
from hacl_megatron.training.validation import Validation

_TARGETLESS_STEPS = 100
"""So many steps, or an epoch's where those are fewer, may pass before the first target token or pair."""
_BAD_FRACTION_MIN_SAMPLES = 1000
"""The bad share is judged from here on (or from one epoch of a smaller set): one of the first ten is not 10 %."""


@dataclass(frozen=True, kw_only=True)
class _Received:
    """A step's data on this rank."""

    step_batches: StepBatches | None
    """None on ranks that do not read."""
    micro_batches: list[MicroBatch]
    counts: GlobalCounts
    waited: float
    """Seconds until the loader had it."""
    first_features: Tensor | None
    """`Step.start_images`."""


class Trainer:
    """Owns one run between its start and its end. Every rank has one and takes the same decisions.

    Args:
        loader: on the rank of each replica that reads data, None on the others.
        validation: None to never validate.
        log: on one rank alone.
        profile: the iterations that are traced on this rank.
        stop_requests: what has listened since before the trainer was built; ended by `close`.
        beat: called whenever something is done; the watchdog listens.
    """

    def __init__(
        self,
        run: Run,
        trainee: Trainee,
        start: StartingPoint,
        *,
        loader: StepLoader | None,
        validation: Validation | None,
        saving: Saving,
        log: MetricsLog | None,
        profile: ProfileWindow,
        stop_requests: StopRequests | None = None,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self.run, self.config = run, run.config
        self.trainee, self.progress, self.data_state = trainee, start.progress, start.data_state
        self._resumed, self._changes = replace(start.progress), list(start.changes)
        self.num_samples, self.length, self.train_iters = start.num_samples, start.length, start.length.train_iters
        self.loader, self.validation, self.saving = loader, validation, saving
        self.log, self.profile, self.beat = log, profile, beat
        self._untrained = UntrainedSamples(self.progress.untrained_kinds, self.config.checkpoint.save, self._say)
        self._uncompared = UntrainedSamples({}, self.config.checkpoint.save, self._say, UNCOMPARED)
        self.stop_requests = stop_requests or StopRequests(self.config.training.exit_duration_in_mins)
        self.step = Step(run, trainee)
        self._peak_flops = peak_flops(device_name(run.device), bf16=self.config.model.bf16)
        self._memory_tag = memory_in_use(run.device)[0]

    # ---------------------------------------------------------------- the loop

    def train(self) -> str | None:
        """Train to the last iteration (None), or until something asks to stop (what it was)."""
        batches = iter(self.loader) if self.loader is not None else None
        stop = upcoming = None
        first = self.progress.iteration
        while self.progress.iteration < self.train_iters and stop is None:
            self.beat()
            iteration = self.progress.iteration + 1
            step_of_schedule = self.length.position + (iteration - first) * self.length.increment
            is_logged = self._is_logged(iteration)
            self.profile.begin(iteration)
            started = time.perf_counter()
            received = upcoming or self._receive(batches)
            step_batches, micro_batches, waited = received.step_batches, received.micro_batches, received.waited
            with self.profile.phase("forward-backward"):
                losses = self.step.forward_backward(
                    micro_batches,
                    received.counts,
                    contrastive_weight=contrastive_weight_at(
                        self.config.objective, step_of_schedule, self.length.steps
                    ),
                    timed=is_logged,
                    first_features=received.first_features,
                )
            # While a GPU is busy with this step, the next one's data get ready for it.
            upcoming = self._receive(batches) if self._goes_on_behind(iteration) else None
            with self.profile.phase("update"):
                metrics, result = self.step.update(losses)
            seconds = time.perf_counter() - started
            scalars = self._scalars(metrics, result, micro_batches, seconds) if is_logged else {}
            self._advance(step_batches, result)
            self._judge_targets(received.counts)
            own = self._own_numbers(micro_batches, waited) if is_logged else None
            stop, ranks = self._end_of_step(step_batches, own)
            self.profile.finish()
            if is_logged:
                scalars |= rank_scalars(ranks, seconds, memory_tag=self._memory_tag, peak_flops=self._peak_flops)
                scalars |= self._counters()
            if stop is None and self._due(self.config.training.eval_interval):  # whoever must stop has no time for it
                scalars |= self._validate()
            self._report(scalars)
            if self._due(self.config.checkpoint.save_interval):
                self._save()
            stop = stop or self._planned_exit()
            self._give_up_if_hopeless()
        self._save(finish=True)
        for line in [*self._untrained.lines(), *self._uncompared.lines()]:
            self._say(line)
        self.stop_requests.close()
        if self.progress.iteration >= self.train_iters:
            return None
        self._say(f"stopped after iteration {self.progress.iteration}: {stop}")
        return stop

    def _receive(self, batches: Iterator[StepBatches] | None) -> "_Received":
        with self.profile.phase("load"):
            started = time.perf_counter()
            step_batches = next(batches) if batches is not None else None
            waited = time.perf_counter() - started
            micro_batches, counts = self.step.receive(step_batches)
            return _Received(
                step_batches=step_batches,
                micro_batches=micro_batches,
                counts=counts,
                waited=waited,
                first_features=self.step.start_images(micro_batches),
            )

    def _goes_on_behind(self, iteration: int) -> bool:
        """Whether another step is to follow without a save before it: data that fail to load must not cost one."""
        intervals = (self.config.training.exit_interval, self.config.checkpoint.save_interval)
        return iteration < self.train_iters and not any(
            interval and iteration % interval == 0 for interval in intervals
        )

    def _due(self, interval: int | None) -> bool:
        return bool(interval) and self.progress.iteration % interval == 0

    def _advance(self, step_batches: StepBatches | None, result: UpdateResult) -> None:
        progress = self.progress
        progress.iteration += 1
        progress.drawn_samples += self.run.layout.global_batch_size
        if step_batches is not None:
            self.data_state = step_batches.data_state
        if result.applied:
            self.trainee.scheduler.step(increment=self.length.increment)
            progress.consecutive_skips = 0
        else:
            progress.skipped_steps += 1
            progress.consecutive_skips += 1
            self._say(
                f"step {progress.iteration} skipped: loss or gradients not finite "
                f"({progress.consecutive_skips} in a row, {progress.skipped_steps} in all)"
            )

    def _end_of_step(
        self, step_batches: StepBatches | None, own: RankNumbers | None
    ) -> tuple[str | None, list[RankNumbers]]:
        """Bring what only some ranks know to all: what became of the samples, wishes to stop, and in a step that is
        logged every rank's `own` numbers."""
        reason = self.stop_requests.reason() or self.saving.why_no_more()
        data = step_batches or StepBatches(micro_batches=[], data_state={})
        local = [
            len(data.bad_samples), len(data.untrained_samples), len(data.uncompared_twins),
            data.num_tokenization_mismatches, data.num_truncated, reason is not None,
        ]  # fmt: skip
        if own is not None:
            local += own.slots(dist.get_rank(), dist.get_world_size())
        sums = self.run.groups.sums(local)
        num_bad, num_untrained, num_uncompared, mismatches, truncated, num_reasons = sums[:6]
        ranks = RankNumbers.of_slots(sums[6:])
        self.progress.tokenization_mismatches += int(mismatches)
        self.progress.truncated_dialogues += int(truncated)
        if num_bad:
            self.progress.bad_samples += int(num_bad)
            report_bad_samples(data.bad_samples, self.progress.iteration, self.config.checkpoint.save, self._say)
        if num_untrained:
            self.progress.untrained_samples += int(num_untrained)
            self._untrained.report(data.untrained_samples, self.progress.iteration)
        if num_uncompared:
            self.progress.uncompared_twins += int(num_uncompared)
            self._uncompared.report(data.uncompared_twins, self.progress.iteration)
        if not num_reasons:
            return None, ranks
        reasons: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, reason)
        return next(text for text in reasons if text is not None), ranks

    def _judge_targets(self, counts: GlobalCounts) -> None:
        trains, progress = self.config.losses_that_train, self.progress
        if counts.twins:
            progress.twinless_steps = None
        elif progress.twinless_steps is not None and self.config.preference.preference_loss != "none":
            progress.twinless_steps += 1
        # Without weight a batch has no pairs, but targets and twins.
        if ("generation" in trains and counts.targets) or counts.pairs or ("preference" in trains and counts.twins):
            progress.targetless_steps = None
            return
        if progress.targetless_steps is not None:
            progress.targetless_steps += 1
        self._say(f"step {progress.iteration} trained nothing: none of its samples has {self._wanted()}")

    def _wanted(self) -> str:
        """What a step needs at least, to train."""
        return f"{'a target token' if 'generation' in self.config.losses_that_train else 'a twin'} or a pair"

    def _planned_exit(self) -> str | None:
        training = self.config.training
        if self._due(training.exit_interval) and self.progress.iteration < self.train_iters:
            return f"--exit-interval {training.exit_interval}"
        return None

    def _give_up_if_hopeless(self) -> None:
        progress, limit, save = self.progress, self.config.data.max_bad_fraction, self.config.checkpoint.save
        # From the resume on: whoever resumes may have mended the data.
        since = self._resumed.iteration
        drawn = progress.drawn_samples - self._resumed.drawn_samples
        bad = progress.bad_samples - self._resumed.bad_samples
        if drawn >= min(_BAD_FRACTION_MIN_SAMPLES, self.num_samples) and bad > limit * drawn:
            self._save(finish=True)
            where = Path(save) / BAD_SAMPLES_FILE if save else "the log"
            raise TrainingStopped(
                f"{bad} of {drawn} samples {f'since iteration {since} ' if since else ''}were unusable, more than "
                f"--max-bad-fraction {limit}: see {where}, mend the data or raise the limit"
                + (f" ({progress.bad_samples} of {progress.drawn_samples} in the whole run)" if since else "")
            )
        steps = min(_TARGETLESS_STEPS, -(-self.num_samples // self.run.layout.global_batch_size))
        objective, without = self.config.preference.preference_loss, progress.twinless_steps
        if objective != "none" and without and (without >= steps or progress.iteration >= self.train_iters):
            progress.twinless_steps = 0  # whoever resumes may have mended the data
            self._save(finish=True, again=True)
            raise TrainingStopped(
                f"--preference-loss {objective} found no twin to compare in {without} steps "
                f"({progress.uncompared_twins} twins of the run are listed in {BAD_SAMPLES_FILE}): expected "
                "hallucinated captions of answers, or rejected answers; mend the data, or leave the flag out"
            )
        found = progress.targetless_steps
        if found and progress.untrained_samples and (found >= steps or progress.iteration >= self.train_iters):
            progress.targetless_steps = 0  # likewise
            self._save(finish=True, again=True)
            where = Path(save) / BAD_SAMPLES_FILE if save else "the log"
            raise TrainingStopped(
                f"no sample of {found} steps had {self._wanted()}, expected answers to train on: see "
                f"{where}, mend the data or choose another --version"
            )
        skips = progress.consecutive_skips
        if skips > self.config.optimizer.max_skipped_steps:
            progress.consecutive_skips = 0  # whoever resumes has changed something
            self._save(finish=True, again=True)
            raise TrainingStopped(
                f"loss or gradients were not finite in {skips} steps in a row, more than "
                f"--max-skipped-steps {self.config.optimizer.max_skipped_steps}: lower --lr, or look at the data"
            )

    def _save(self, *, finish: bool = False, again: bool = False) -> None:
        self.beat()
        try:
            self.saving.save(self.progress, self.data_state, finish=finish, again=again)
        finally:
            self.saving.say_notes()

    def close(self) -> None:
        """End what runs beside the loop, also after a failure."""
        self.profile.close()
        self.saving.close()
        self.stop_requests.end()
        self.saving.say_notes()

    def _validate(self) -> dict[str, float]:
        if self.validation is None:
            return {}
        self.trainee.gather_parameters()  # packs without images leave modules out, on some ranks and not on others
        means = self.validation(self.step, self.beat, self._say)
        found = ", ".join(f"{k} {v:.4f}" for k, v in means.items())
        found = found or "nothing to show: no sample has a target token or a pair, or no loss is finite"
        self._say(f"validation at {self.progress.iteration}: {found}")
        return {f"{tag} validation": value for tag, value in means.items()}

    # ---------------------------------------------------------------- what the user sees

    def _say(self, text: str) -> None:
        if self.log is not None:
            self.log.say(text)

    def told_so_far(self) -> dict[str, object]:
        """What the run's status tells of it; may be called from any thread."""
        lost = {"lost_lines": lost_lines() or None}
        if self.log is not None:
            lost["lost_metrics"] = self.log.num_lost or None
        samples = {key: copy(getattr(self.progress, key)) for key in SAMPLE_KEYS}
        reached = {"iteration": self.progress.iteration, "train_iters": self.train_iters}
        return {**reached, **samples, **lost, "changes": self._changes or None}

    def _report(self, scalars: dict[str, float]) -> None:
        self.saving.say_notes()
        if self.log is None:
            return
        self.log.advance()
        if scalars:
            self.log.log(self.progress.iteration, scalars)

    def _is_logged(self, iteration: int) -> bool:
        """Also with each validation, and at the end."""
        intervals = (self.config.logging.log_interval, self.config.training.eval_interval)
        return iteration == self.train_iters or any(interval and iteration % interval == 0 for interval in intervals)

    def _own_numbers(self, micro_batches: list[MicroBatch], waited: float) -> RankNumbers:
        """This rank's, to be compared with the others' and added up."""
        layout = self.run.layout
        flops = step_flops(
            self.config.architecture,
            micro_batches,
            trains_language_model=not self.config.language_model_is_frozen,
            trains_vision_tower=not self.config.model.freeze_ViT,
            trains_qformer=not self.config.model.freeze_qformer,
            lora=Lora.of(self.config.lora),
        )
        return RankNumbers(
            flops=flops / (layout.tp * layout.cp * layout.pp),
            own_seconds=self.step.own_time.take(),
            data_wait=waited,
            memory=memory_in_use(self.run.device)[1],
        )

    def _counters(self) -> dict[str, float]:
        """What adds up over the run, and what saving cost since it was last logged."""
        counters = {
            "bad-samples": self.progress.bad_samples,
            "untrained-samples": self.progress.untrained_samples,
            "tokenization-mismatches": self.progress.tokenization_mismatches,
            "truncated-dialogues": self.progress.truncated_dialogues,
        }
        if self.config.preference.preference_loss != "none":
            counters["uncompared-twins"] = self.progress.uncompared_twins
        if stall := self.saving.take_stall():
            counters["save-stall-seconds"] = stall
        return counters

    def _scalars(
        self, metrics: StepMetrics, result: UpdateResult, micro_batches: list[MicroBatch], seconds: float
    ) -> dict[str, float]:
        layout = self.run.layout
        scalars = {
            **loss_scalars(metrics),
            "temperature": metrics.temperature,
            "contrastive weight": metrics.weights.contrastive,
            "learning-rate": default_learning_rate(self.trainee.scheduler),
            "grad-norm": result.grad_norm,
            "batch-size": layout.global_batch_size,
            "iteration-time": seconds,
            "samples-per-second": layout.global_batch_size / seconds,
            "tokens-per-second-per-gpu": metrics.counts.rows / seconds / layout.world_size,
            "ahead-share": self.step.seconds_ahead / seconds,
            "micro-batches": len(micro_batches),
            "skipped-steps": self.progress.skipped_steps + (not result.applied),
        }
        if result.grad_norms_apart is not None:
            scalars["grad-norm others"], scalars["grad-norm heads"] = result.grad_norms_apart
        if result.num_zeros is not None:
            scalars["num-zeros"] = result.num_zeros
        if self.config.logging.log_params_norm:
            scalars["params-norm"] = params_norm(self.trainee)
        return scalars
