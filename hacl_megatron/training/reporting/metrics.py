"""Where the numbers of a run go: TensorBoard, `metrics.jsonl`, optionally Weights & Biases, and the terminal.

Only one rank builds a `MetricsLog`; the tags are Megatron-LM's where it has the thing.
"""

import contextlib
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hacl_megatron.checkpoint.run.folder import write_atomically
from hacl_megatron.config.console import printable, say

# What the terminal shows of an iteration, and how.
_TERMINAL = (
    ("lm loss", "lm {:.4f}"),
    ("contrastive loss", "contrastive {:.4f}"),
    ("retrieval accuracy i2t", "i2t {:.3f}"),
    ("hallucination accuracy", "hal-acc {:.3f}"),
    ("preference loss", "preference {:.4f}"),
    ("preference accuracy", "pref-acc {:.3f}"),
    ("temperature", "τ {:.4f}"),
    ("grad-norm", "grad {:.2f}"),
    ("learning-rate", "lr {:.2e}"),
    ("samples-per-second", "{:.1f} samples/s"),
)


# TensorBoard's page `Custom Scalars`: what belongs on one chart, a run's curve beside its validation's. The tags
# themselves are flat, as in Megatron-LM, and stand in alphabetical order on the other pages.
_PAGE = {
    "Losses": {
        "language model, a target token": ["lm loss", "lm loss validation"],
        "contrastive": ["contrastive loss", "contrastive loss validation"],
        "contrastive by direction": ["contrastive loss i2t", "contrastive loss t2i"],
    },
    "Contrast": {
        "image finds its caption": ["retrieval accuracy i2t", "retrieval accuracy i2t validation"],
        "caption preferred to hallucinated": ["hallucination accuracy", "hallucination accuracy validation"],
        "margin over hallucinated": ["hallucination margin", "hallucination margin validation"],
        "temperature": ["temperature"],
        "weight in the loss": ["contrastive weight"],
    },
    "Optimiser": {
        "learning rate": ["learning-rate"],
        "gradient norm": ["grad-norm", "grad-norm others", "grad-norm heads"],
        "parameter norm": ["params-norm"],
        "skipped steps, unusable samples, samples that train nothing": [
            "skipped-steps",
            "bad-samples",
            "untrained-samples",
        ],
    },
    "Speed": {
        "samples a second": ["samples-per-second"],
        "model TFLOP/s a GPU": ["model-tflops-per-gpu"],
        "of a step: data wait, pass ahead; of the peak: MFU": ["data-wait-share", "ahead-share", "mfu"],
        "slowest rank's time over the median's": ["rank-time-spread"],
        "slowest rank": ["slowest-rank"],
        "memory, bytes": ["mem-max-allocated-bytes", "mem-resident-bytes"],
        "seconds": ["iteration-time", "save-stall-seconds"],
    },
}
_PAGE_OF_TWINS = {
    "Likelihood of twins": {
        "objective": ["preference loss", "preference loss validation"],
        "true answer likelier than its twin": ["preference accuracy", "preference accuracy validation"],
        "margin": ["preference margin", "preference margin validation"],
        "twins that are not compared": ["uncompared-twins"],
    },
}
"""With `--preference-loss`."""
_CHARTS_OF_A_REFERENCE = {
    "rewards: beta times log-likelihood over the reference's": [
        "rewards/chosen", "rewards/rejected", "rewards/chosen validation", "rewards/rejected validation",
    ],
    "log-likelihood of the answers": ["logps/chosen", "logps/rejected"],
}  # fmt: skip
"""Behind those, with dpo and mdpo."""
_OF_PAIRS = ("contrastive", "retrieval", "hallucination", "temperature")
"""What tags begin with that say nothing with `--contrastive-weight 0`."""


def terminal_line(scalars: Mapping[str, float]) -> str:
    """The chosen scalars that are there and finite, as one line."""
    parts = [form.format(scalars[tag]) for tag, form in _TERMINAL if not math.isnan(scalars.get(tag, math.nan))]
    return " | ".join(parts)


class MetricsLog:
    """Writes scalars to every sink. After a resume, what was logged beyond `first_iteration` is dropped first.

    Args:
        tensorboard_dir: folder for TensorBoard events, or None.
        jsonl: file that gets one JSON object an iteration, or None.
        first_iteration: the last iteration that is kept; 0 for a fresh run.
        last_iteration: total of the progress bar.
        wandb_project: project name, or None.
        wandb_dir: folder that keeps its files and the run's id, so that a resumed run goes on with the same curves.
        config: all flags by their groups, shown by Weights & Biases beside the curves; decides what the page has.
    """

    def __init__(
        self,
        *,
        tensorboard_dir: Path | None,
        jsonl: Path | None,
        first_iteration: int,
        last_iteration: int,
        wandb_project: str | None = None,
        wandb_dir: Path | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self._writer = self._file = self._wandb = None
        self._tensorboard_dir, self._jsonl, self._first = tensorboard_dir, jsonl, first_iteration
        self._config = dict(config or {})
        self._could_write = True
        self.num_lost = 0
        """Iterations of which a sink took nothing, or not all."""
        if wandb_project is not None:
            self._wandb = _open_wandb(wandb_project, wandb_dir, dict(config or {}), goes_on=first_iteration > 0)
        self._bar = tqdm(
            total=last_iteration,
            initial=first_iteration,
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )
        self._last = last_iteration
        self._note([*self._tried(self._open_tensorboard), *self._tried(self._open_jsonl)])

    def _open_tensorboard(self) -> None:
        if self._tensorboard_dir is not None and self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # purge_step hides what a run that was killed after its last checkpoint had already logged.
            self._writer = SummaryWriter(str(self._tensorboard_dir), purge_step=self._first + 1)
            self._writer.add_custom_scalars(_custom_scalars(self._config))

    def _open_jsonl(self) -> None:
        if self._jsonl is not None and self._file is None:
            self._jsonl.parent.mkdir(parents=True, exist_ok=True)
            keep_iterations(self._jsonl, self._first)
            self._file = self._jsonl.open("a", encoding="utf-8")

    def _tried(self, work: Callable[..., None], *arguments: Any) -> list[str]:
        """What went wrong, if anything: a full disk is no reason to end a run."""
        try:
            work(*arguments)
        except OSError as error:
            return [str(error)]
        return []

    def _note(self, problems: list[str]) -> None:
        if problems and self._could_write:  # once, until it goes well again
            self.say(f"metrics cannot be written, the run goes on without: {'; '.join(problems)}")
        elif not problems and not self._could_write:
            self.say(f"metrics can be written again; {self.num_lost} iterations are lost or late")
        self._could_write = not problems

    def advance(self) -> None:
        """One iteration is done, whether or not it is logged."""
        self._bar.update(1)

    def log(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """Write the finite scalars of `iteration` everywhere."""
        finite = {tag: value for tag, value in scalars.items() if math.isfinite(value)}
        problems = [
            *self._tried(self._to_tensorboard, iteration, finite), *self._tried(self._to_jsonl, iteration, finite)
        ]  # fmt: skip
        self.num_lost += bool(problems)
        self._note(problems)
        if self._wandb is not None:
            self._wandb.log(finite, step=iteration)
        line = terminal_line(scalars)
        if line and self._bar.disable:
            print(f"iteration {iteration}/{self._last} | {line}", flush=True)
        elif line:
            self._bar.set_postfix_str(line)

    def _to_tensorboard(self, iteration: int, scalars: Mapping[str, float]) -> None:
        if self._writer is None and self._tensorboard_dir is not None:  # its thread ended on a full disk
            self._first = iteration - 1
            self._open_tensorboard()
        try:
            for tag, value in scalars.items() if self._writer is not None else ():
                self._writer.add_scalar(tag, value, iteration)
        except OSError:
            self._writer = None
            raise

    def _to_jsonl(self, iteration: int, scalars: Mapping[str, float]) -> None:
        self._open_jsonl()
        if self._file is not None:
            self._file.write(json.dumps({"iteration": iteration, **scalars}) + "\n")
            self._file.flush()  # what a full disk refuses stays in the buffer for the next time

    def say(self, text: str) -> None:
        """A line for the user that does not disturb the progress bar."""
        if self._bar.disable:
            say(text)
        else:
            self._bar.write(printable(text, lines=True))

    def close(self) -> None:
        """Flush and close every sink."""
        self._bar.close()
        for sink in (self._writer, self._file):
            if sink is not None:
                with contextlib.suppress(OSError):  # a full disk, which was said
                    sink.close()
        if self._wandb is not None:
            self._wandb.finish()


def _custom_scalars(config: Mapping[str, Any]) -> dict[str, dict[str, list]]:
    """The page as TensorBoard has it, tags as regular expressions: of what a run with these flags, by groups, has."""
    objective = config.get("preference", {}).get("preference_loss", "none")
    has_pairs = config.get("objective", {}).get("contrastive_weight", 1.0) > 0
    page = {}
    for group, charts in _PAGE.items():
        if group == "Optimiser" and objective != "none":
            more = _CHARTS_OF_A_REFERENCE if objective in ("dpo", "mdpo") else {}
            page |= {title: charts_of_twins | more for title, charts_of_twins in _PAGE_OF_TWINS.items()}
        page[group] = {title: tags for title, tags in charts.items() if has_pairs or not tags[0].startswith(_OF_PAIRS)}
    return {
        group: {title: ["Multiline", [f"^{re.escape(tag)}$" for tag in tags]] for title, tags in charts.items()}
        for group, charts in page.items()
        if charts
    }


def _open_wandb(project: str, folder: Path | None, config: dict[str, Any], *, goes_on: bool) -> Any:
    """A Weights & Biases run; one that `goes_on` has the id that `folder` keeps."""
    import wandb

    note = None if folder is None else folder / "wandb_run_id.txt"
    known = note.read_text(encoding="utf-8").strip() if goes_on and note is not None and note.is_file() else None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    run = wandb.init(project=project, config=config, dir=folder, id=known, resume="allow" if known else None)
    if note is not None:
        note.write_text(f"{run.id}\n", encoding="utf-8")
    return run


def keep_iterations(jsonl: Path, last: int) -> None:
    """Drop lines beyond iteration `last`, which a resumed run writes again, and a line that a kill cut short."""
    if not jsonl.exists():
        return
    kept = []
    for line in jsonl.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["iteration"] <= last:
                kept.append(line + "\n")
        except (ValueError, LookupError, TypeError, RecursionError):  # half a line, or no line of a run
            continue
    write_atomically(jsonl, "".join(kept))
