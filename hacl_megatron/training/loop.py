"""The training loop: load, step, log, evaluate, save; and when to give up."""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hacl_megatron.assemble.exchange import exchange_step, global_sums
from hacl_megatron.batch import BadSample, MicroBatch, StepBatches
from hacl_megatron.checkpoint.run.load import state_metadata
from hacl_megatron.checkpoint.run.local_parts import frozen_keys
from hacl_megatron.checkpoint.run.save import CheckpointSaver
from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.config.layout import Layout
from hacl_megatron.config.lora import Lora
from hacl_megatron.config.run import RunConfig, to_yaml
from hacl_megatron.data.loader import StepLoader
from hacl_megatron.platform.hardware import peak_flops
from hacl_megatron.platform.stopwatch import device_name, memory_in_use
from hacl_megatron.training.flops import step_flops
from hacl_megatron.training.reporting.metrics import MetricsLog
from hacl_megatron.training.reporting.profiling import ProfileWindow
from hacl_megatron.training.reporting.scalars import loss_scalars, mean_losses, params_norm
from hacl_megatron.training.reporting.step_time import RankNumbers, rank_scalars
from hacl_megatron.training.schedule import contrastive_weight_at, default_learning_rate
from hacl_megatron.training.signals import StopRequests
from hacl_megatron.training.state import Progress, run_state
from hacl_megatron.training.step import GlobalCounts, Step, StepMetrics, UpdateResult
from hacl_megatron.training.trainee import Trainee

_BAD_FRACTION_MIN_SAMPLES = 1000
"""The bad share is judged from here on (or from one epoch of a smaller set): one of the first ten is not 10 %."""


_LAST_SAVE_SECONDS = 60
"""How long a run that fails waits for a checkpoint that is being written."""


class TrainingStopped(RuntimeError):
    """The run cannot go on; the message says why and what to do. A checkpoint was saved if --save is set."""


class Trainer:
    """Owns one run between its start and its end. Every rank has one and takes the same decisions.

    Args:
        loader: on the rank of each replica that reads data, None on the others.
        make_valid_loader: gives a loader that starts at the first validation sample (None on the ranks that do not
            read data); None to never validate.
        evaluate_tasks: `--eval-tasks`: more scalars of each validation, on the rank with the log.
        log: on one rank alone.
        write_assets: puts tokenizer and processor files into a folder of each checkpoint.
        profile: the iterations that are traced on this rank.
        beat: called whenever something is done; the watchdog listens.
    """

    def __init__(
        self,
        config: RunConfig,
        architecture: ModelConfig,
        layout: Layout,
        trainee: Trainee,
        progress: Progress,
        *,
        data_state: dict[str, Any],
        loader: StepLoader | None,
        make_valid_loader: Callable[[], StepLoader | None] | None,
        evaluate_tasks: Callable[[], dict[str, float]] | None,
        num_samples: int,
        train_iters: int,
        log: MetricsLog | None,
        write_assets: Callable[[Path], None],
        profile: ProfileWindow,
        device: torch.device,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.architecture = architecture
        self.layout = layout
        self.trainee = trainee
        self.progress = progress
        self.data_state = data_state
        self.loader = loader
        self.make_valid_loader = make_valid_loader
        self.evaluate_tasks = evaluate_tasks
        self.num_samples = num_samples
        self.train_iters = train_iters
        self.log = log
        self.write_assets = write_assets
        self.profile = profile
        self.device = device
        self.beat = beat
        self.stop_requests = StopRequests(config.training.exit_duration_in_mins)
        self.step = Step(
            trainee.model,
            trainee.optimizer,
            config,
            vocab_size=architecture.language.vocab_size,
            queue=trainee.queue,
            groups=trainee.groups,
            device=device,
        )
        self._peak_flops = peak_flops(device_name(device), bf16=config.model.bf16)
        self._memory_tag = memory_in_use(device)[0]
        self._saved_at = progress.iteration
        self._stall = 0.0
        """Seconds that the last save kept this rank from training, until they are logged."""
        self.saver = self._make_saver()
        self._frozen = frozen_keys(trainee.module.sharded_state_dict(metadata=state_metadata()))

    # ---------------------------------------------------------------- the loop

    def train(self) -> str | None:
        """Train to the last iteration (None), or until something asks to stop (what it was)."""
        batches = iter(self.loader) if self.loader is not None else None
        stop = None
        while self.progress.iteration < self.train_iters and stop is None:
            self.beat()
            iteration = self.progress.iteration + 1
            self.step.own_time.is_on = is_logged = self._is_logged(iteration)
            self.profile.begin(iteration)
            started = time.perf_counter()
            with self.profile.phase("load"):
                step_batches = next(batches) if batches is not None else None
                waited = time.perf_counter() - started
                micro_batches, counts = self._receive(step_batches)
            with self.profile.phase("forward-backward"):
                self.step.contrast.weight = contrastive_weight_at(self.config.objective, iteration, self.train_iters)
                metrics = self.step.forward_backward(micro_batches, counts)
            with self.profile.phase("update"):
                result = self.step.update(loss_is_finite=math.isfinite(metrics.total(self.step.contrast.weight)))
            seconds = time.perf_counter() - started
            scalars = self._scalars(metrics, result, micro_batches, seconds) if is_logged else {}
            self._advance(step_batches, result)
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
        self.stop_requests.close()
        if self.progress.iteration >= self.train_iters:
            return None
        self._say(f"stopped after iteration {self.progress.iteration}: {stop}")
        return stop

    def _due(self, interval: int | None) -> bool:
        return bool(interval) and self.progress.iteration % interval == 0

    def _receive(self, step_batches: StepBatches | None) -> tuple[list[MicroBatch], GlobalCounts]:
        """This replica's micro-batches on its every rank, and what the losses are divided by."""
        groups, module = self.trainee.groups, self.trainee.module
        micro_batches = exchange_step(
            step_batches.micro_batches if step_batches is not None else None,
            model_parallel_group=groups.mp,
            tensor_parallel_group=groups.tp,
            holds_vision_tower=module.pre_process,
            image_size=self.architecture.vision.image_size,
            device=self.device,
        )
        return micro_batches, self.step.count(micro_batches)

    def _advance(self, step_batches: StepBatches | None, result: UpdateResult) -> None:
        progress = self.progress
        progress.iteration += 1
        progress.drawn_samples += self.layout.global_batch_size
        if step_batches is not None:
            self.data_state = step_batches.data_state
        if result.applied:
            self.trainee.scheduler.step(increment=1)
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
        reason = self.stop_requests.reason()
        data = step_batches or StepBatches(micro_batches=[], data_state={})
        local = [len(data.bad_samples), data.num_tokenization_mismatches, data.num_truncated, reason is not None]
        if own is not None:
            local += own.slots(dist.get_rank(), dist.get_world_size())
        sums = global_sums(local, group=dist.group.WORLD, device=self.device)
        num_bad, mismatches, truncated, num_reasons = sums[:4]
        ranks = RankNumbers.of_slots(sums[4:])
        self.progress.tokenization_mismatches += int(mismatches)
        self.progress.truncated_dialogues += int(truncated)
        if num_bad:
            self.progress.bad_samples += int(num_bad)
            self._write_bad_samples(data.bad_samples)
        if not num_reasons:
            return None, ranks
        reasons: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, reason)
        return next(text for text in reasons if text is not None), ranks

    def _planned_exit(self) -> str | None:
        training = self.config.training
        if self._due(training.exit_interval) and self.progress.iteration < self.train_iters:
            return f"--exit-interval {training.exit_interval}"
        return None

    def _give_up_if_hopeless(self) -> None:
        progress, limit = self.progress, self.config.data.max_bad_fraction
        judged = progress.drawn_samples >= min(_BAD_FRACTION_MIN_SAMPLES, self.num_samples)
        if judged and progress.bad_samples > limit * progress.drawn_samples:
            self._save(finish=True)
            raise TrainingStopped(
                f"{progress.bad_samples} of {progress.drawn_samples} samples were unusable, more than "
                f"--max-bad-fraction {limit}: see {self._output('bad_samples.jsonl')}, mend the data or raise the limit"
            )
        skips = progress.consecutive_skips
        if skips > self.config.optimizer.max_skipped_steps:
            progress.consecutive_skips = 0  # whoever resumes has changed something
            self._saved_at = -1  # save again, with the count reset
            self._save(finish=True)
            raise TrainingStopped(
                f"loss or gradients were not finite in {skips} steps in a row, more than "
                f"--max-skipped-steps {self.config.optimizer.max_skipped_steps}: lower --lr, or look at the data"
            )

    # ---------------------------------------------------------------- what a run leaves behind

    def _make_saver(self) -> CheckpointSaver | None:
        checkpoint, groups = self.config.checkpoint, self.trainee.groups
        if checkpoint.save is None:
            return None
        return CheckpointSaver(
            Path(checkpoint.save),
            asynchronous=checkpoint.async_save,
            newest=checkpoint.save_retain,
            every=checkpoint.save_keep_interval,
            replica=groups.dp.rank(),
            num_replicas=groups.dp.size(),
        )

    def _save(self, *, finish: bool = False) -> None:
        """Save this iteration unless that was done. With `finish` it is on disk afterwards, or the run ends saying why.

        A save that fails otherwise is reported, and the next one is tried when it is due.
        """
        if self.saver is None:
            return
        self.beat()
        if self._saved_at != self.progress.iteration:
            self._start_save(asynchronous=None if not finish else False)
        if finish and self.saver.wait() is not None:
            self._say_notes()
            self._start_save(asynchronous=False)  # once more: it may have been a moment's
        self._say_notes()
        if finish and (error := self.saver.wait()) is not None:
            raise TrainingStopped(
                f"iteration {self.progress.iteration} could not be saved to {self.config.checkpoint.save} ({error}): "
                "make room and resume with --load from the last checkpoint that is there"
            )

    def _start_save(self, *, asynchronous: bool | None) -> None:
        started = time.perf_counter()
        self.trainee.gather_parameters()
        self.saver.save(
            self.progress.iteration,
            lambda: run_state(self.trainee, self.progress, self._data_state_of_run()),
            frozen=self._frozen,
            run_config=to_yaml(self.config),
            write_assets=self.write_assets,
            asynchronous=asynchronous,
        )
        self._saved_at = self.progress.iteration
        self._stall += time.perf_counter() - started

    def _say_notes(self) -> None:
        for note in self.saver.notes() if self.saver is not None else ():
            self._say(note)

    def close(self) -> None:
        """Let what is being saved reach the disk, for a while: after a failure the other ranks may be gone."""
        self.profile.close()
        if self.saver is not None:
            self.saver.close(_LAST_SAVE_SECONDS)
            self._say_notes()

    def _data_state_of_run(self) -> dict[str, Any]:
        # Only ranks that read data have seen it move on; megatron-core wants the same on every rank.
        state = [self.data_state]
        dist.broadcast_object_list(state, src=0)
        return state[0]

    def _write_bad_samples(self, bad: list[BadSample]) -> None:
        everywhere: list[list[BadSample] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, bad)
        target = self._output("bad_samples.jsonl")
        if dist.get_rank() != 0:
            return
        samples = [sample for part in everywhere for sample in part or []]
        for sample in samples[:3]:
            self._say(f"bad sample {sample.name}: {sample.source}: {sample.reason}")
        if target is not None:
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("a", encoding="utf-8") as file:
                    for sample in samples:
                        file.write(json.dumps({"iteration": self.progress.iteration, **asdict(sample)}) + "\n")
            except OSError as error:  # a full disk is no reason to end a run
                self._say(f"{len(samples)} bad samples are not in {target}: {error}")

    def _output(self, name: str) -> Path | None:
        return Path(self.config.checkpoint.save) / name if self.config.checkpoint.save else None

    def _say(self, text: str) -> None:
        if self.log is not None:
            self.log.say(text)

    # ---------------------------------------------------------------- numbers

    def _report(self, scalars: dict[str, float]) -> None:
        self._say_notes()
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
        flops = step_flops(
            self.architecture,
            micro_batches,
            trains_language_model=not self.config.language_model_is_frozen,
            trains_vision_tower=not self.config.model.freeze_ViT,
            trains_qformer=not self.config.model.freeze_qformer,
            lora=Lora.of(self.config.lora),
        )
        return RankNumbers(
            flops=flops / (self.layout.tp * self.layout.pp),
            own_seconds=self.step.own_time.take(),
            data_wait=waited,
            memory=memory_in_use(self.device)[1],
        )

    def _counters(self) -> dict[str, float]:
        """What adds up over the run, and what saving cost since it was last logged."""
        counters = {
            "bad-samples": self.progress.bad_samples,
            "tokenization-mismatches": self.progress.tokenization_mismatches,
            "truncated-dialogues": self.progress.truncated_dialogues,
        }
        if self._stall:
            counters["save-stall-seconds"], self._stall = self._stall, 0.0
        return counters

    def _scalars(
        self, metrics: StepMetrics, result: UpdateResult, micro_batches: list[MicroBatch], seconds: float
    ) -> dict[str, float]:
        scalars = {
            **loss_scalars(metrics),
            "temperature": metrics.temperature,
            "contrastive weight": self.step.contrast.weight,
            "learning-rate": default_learning_rate(self.trainee.scheduler),
            "grad-norm": result.grad_norm,
            "batch-size": self.layout.global_batch_size,
            "iteration-time": seconds,
            "samples-per-second": self.layout.global_batch_size / seconds,
            "tokens-per-second-per-gpu": metrics.counts.rows / seconds / self.layout.world_size,
            "ahead-share": self.step.seconds_ahead / seconds,
            "micro-batches": len(micro_batches),
            "skipped-steps": self.progress.skipped_steps + (not result.applied),
        }
        if result.num_zeros is not None:
            scalars["num-zeros"] = result.num_zeros
        if self.config.logging.log_params_norm:
            scalars["params-norm"] = params_norm(self.trainee, self.device)
        return scalars

    def _validate(self) -> dict[str, float]:
        """Mean losses over `--eval-iters` batches of the validation data, always the same ones."""
        if self.make_valid_loader is None:
            return {}
        totals: list[tuple[StepMetrics, GlobalCounts]] = []
        loader = self.make_valid_loader()
        try:
            batches: Iterator[StepBatches] | None = iter(loader) if loader is not None else None
            for _ in range(self.config.training.eval_iters):
                micro_batches, counts = self._receive(next(batches) if batches is not None else None)
                totals.append((self.step.evaluate(micro_batches, counts), counts))
                self.beat()
        finally:
            if loader is not None:
                loader.close()
        means = mean_losses(totals)
        if self.evaluate_tasks is not None:
            means |= self.evaluate_tasks()
        self._say(f"validation at {self.progress.iteration}: " + ", ".join(f"{k} {v:.4f}" for k, v in means.items()))
        return {f"{tag} validation": value for tag, value in means.items()}
