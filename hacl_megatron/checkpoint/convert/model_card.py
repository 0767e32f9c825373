"""`README.md` of an export: the model card that Hugging Face's hub shows, with the metadata by which it is found there.

run_config.yaml ─→ base, data, flags of the run ┐
SAVE/metrics.jsonl ─→ numbers at its iteration  ├→ card ─→ OUT/README.md, unless one of the user's own is there
README.md of the base ─→ its licence            ┘
Paths of this machine stay here: folders and files appear by their last name.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from hacl_megatron.checkpoint.convert.lora_base import origins
from hacl_megatron.checkpoint.run.folder import find_checkpoint, read_run_config
from hacl_megatron.config.checks.foreign_files import LARGEST_CONFIG, own_file
from hacl_megatron.config.console import printable
from hacl_megatron.config.parser import COMMAND_LINE_ONLY, GROUPS
from hacl_megatron.config.run import RunConfig

CARD_FILE, METRICS_FILE = "README.md", "metrics.jsonl"
_MARK = "<!-- written by hacl_megatron, {}: delete this line to keep the text through the next export -->\n"
_LICENCE_KEYS = ("license", "license_name", "license_link")
_OF_THIS_MACHINE = {
    *COMMAND_LINE_ONLY, "save", "load", "data_cache_dir", "tensorboard_dir", "wandb_project", "image_folder",
    "pretrained_checkpoint", "vision_tower", "tokenizer", "pretrain_mm_mlp_adapter", "data_path",
    "contrastive_data_path", "valid_data_path", "reference_scores", "profile_step_start", "profile_step_end",
    "profile_ranks", "num_workers", "io_threads", "prefetch_steps", "device", "load_fallback",
}  # fmt: skip
"""Flags that say where things are and how this machine runs; those of data and base stand in rows of their own."""
_MOST_METRICS = 1 << 30
"""Bytes of the file that is searched for the numbers."""


@dataclass(kw_only=True)
class ModelCard:
    """A card, and what its author should know."""

    text: str
    notes: list[str] = field(default_factory=list)

    def write(self, folder: Path, before: Path) -> list[str]:
        """Write README.md into `folder`, which is to replace `before`; where that has one of the user's own, this
        stays. Returns notes."""
        if kept := keep_own_card(folder, before):
            return [kept]
        digest = hashlib.sha256(self.text.encode()).hexdigest()[:16]
        (folder / CARD_FILE).write_text(self.text + "\n" + _MARK.format(digest), encoding="utf-8")
        return self.notes


def keep_own_card(folder: Path, before: Path) -> str | None:
    """Where `before`, which `folder` is to replace, has a README.md of the user's own, put it into `folder`, over what
    is there; returns a note of it."""
    theirs = before / CARD_FILE
    if not theirs.is_file() or is_ours(theirs):
        return None
    (folder / CARD_FILE).unlink(missing_ok=True)  # it may be a link to another folder's
    (folder / CARD_FILE).write_bytes(theirs.read_bytes())
    return f"{theirs} is your own and stays as it is"


def is_ours(path: Path) -> bool:
    """Whether nobody has changed the card since an export wrote it."""
    text, _, mark = path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").rpartition("\n")
    text = text.removesuffix("\n") + "\n"
    return f"{mark}\n" == _MARK.format(hashlib.sha256(text.encode()).hexdigest()[:16])


def model_card(checkpoint: Path, run: RunConfig, *, model_class: str, library: str | None) -> ModelCard:
    """The card of a checkpoint's export.

    Args:
        model_class: of transformers, or what else loads it.
        library: the hub's `library_name`; None for a layout that no library of the hub loads.
    """
    bases, notes = _bases(run), []
    names = [_code(hub_name(folder) or _name(str(folder))) for folder in bases]
    unnamed = [str(folder) for folder in bases if hub_name(folder) is None]
    ids = [] if unnamed else [hub_name(folder) for folder in bases]
    licence, licence_notes = _licence_of_all(run, bases)
    metadata: dict[str, Any] = {"library_name": library, "pipeline_tag": "image-text-to-text"}
    metadata |= {"base_model": ids[0] if len(ids) == 1 else ids} if ids else {}
    metadata |= {**licence, "tags": ["hacl", "llava", "hallucination"]}
    of = f" of {', '.join(unnamed)}" if unnamed else ""
    missing = [] if ids else [f"base_model (the base's name on the hub is not known here{of})"]
    missing += [] if licence else ["license (the base's folder states none)"]
    if missing:
        notes.append(f"{CARD_FILE} lacks {' and '.join(missing)}: add what is right before you upload it")
    notes += licence_notes
    iteration = int(checkpoint.name.removeprefix("iter_")) if checkpoint.name.startswith("iter_") else None
    rows = {
        "model": f"`{model_class}`",
        "started from": ", ".join(names) or "random weights",
        "trained on": _names(run.data.data_path),
        "before that, on": _names(dict.fromkeys(path for one in _runs_before(run) for path in _data(one))),
        "image-caption pairs of": _names(run.data.contrastive_data_path),
        "validated on": _names(run.data.valid_data_path),
        "conversation template": _code(run.data.version),
        "iteration": f"{iteration:,}" if iteration else "",
    }
    name = checkpoint.parent.name if iteration is not None else checkpoint.name
    text = f"""---
{yaml.safe_dump({key: value for key, value in metadata.items() if value is not None}, sort_keys=False).rstrip()}
---

# {_plain(name)}

{_table({key: value for key, value in rows.items() if value})}
{_use(model_class) if library == "transformers" else ""}
{_training(run) if iteration != 0 else "It was converted, not trained, since then."}
"""
    if found := _numbers(checkpoint.parent / METRICS_FILE, iteration):
        text += f"\n## Numbers\n\nAt iteration {iteration:,}:\n\n" + _table({
            _plain(tag): f"{value:.6g}" for tag, value in found.items()
        })  # fmt: skip
    return ModelCard(text=text, notes=notes)


def hub_name(folder: Path) -> str | None:
    """`organisation/name` of a model on the hub, where its folder lies in the hub's cache. A config's `_name_or_path`
    says what the base itself was made from, and is not asked."""
    for part in folder.absolute().parts:
        if match := re.fullmatch(r"models--([\w.-]+?)--([\w.-]+)", part):
            return f"{match[1]}/{match[2]}"
    return None


def _bases(run: RunConfig) -> list[Path]:
    """Folders of Hugging Face that the run's weights came from, through the runs before it."""
    towers = [config.model.vision_tower for config in (run, *_runs_before(run))]
    return [*dict.fromkeys([*origins(run), *(Path(tower) for tower in towers if tower)])]


def _runs_before(run: RunConfig) -> list[RunConfig]:
    """The run that its weights came from, the one before that, and so on, as far as they are there."""
    found: list[RunConfig] = []
    before = _run_before(run)
    while before is not None and len(found) < 100:
        found.append(before)
        before = _run_before(before)
    return found


def _data(run: RunConfig) -> list[str]:
    return [*run.data.data_path, *run.data.contrastive_data_path]


def _run_before(run: RunConfig) -> RunConfig | None:
    if run.model.pretrained_checkpoint is None:
        return None
    try:
        before = find_checkpoint(Path(run.model.pretrained_checkpoint))
        return None if before is None else read_run_config(before)
    except ValueError:  # gone or damaged meanwhile
        return None


def _licence_of_all(run: RunConfig, bases: list[Path]) -> tuple[dict[str, str], list[str]]:
    """(Licence of the language model, or of the whole model, that the run started from; notes of whose it is, and of
    other bases' that differ): a tower's licence is not that of the model around it."""
    folder = next(origins(run), None)
    licence = _licence(folder) if folder is not None else {}
    notes = [f"{CARD_FILE} states the license of {folder}, {licence['license']}"] if licence else []
    for other in bases:
        theirs = {} if other == folder else _licence(other)
        if theirs and theirs != licence:
            notes.append(f"{other} has another license, {theirs['license']}: see that your model keeps to it too")
    return licence, [printable(note) for note in notes]


def _licence(folder: Path) -> dict[str, str]:
    """What the base's own card says of its licence."""
    try:
        if not own_file(folder / CARD_FILE, LARGEST_CONFIG):
            return {}
        text = (folder / CARD_FILE).read_text(encoding="utf-8", errors="replace")
        match = re.match(r"---\n(.*?)\n---\s*(?:\n|$)", text, re.DOTALL)
        content = yaml.safe_load(match[1]) if match else None
    except (ValueError, OSError, yaml.YAMLError, RecursionError):
        return {}
    if not isinstance(content, dict) or not isinstance(content.get("license"), str):
        return {}
    return {key: content[key] for key in _LICENCE_KEYS if isinstance(content.get(key), str)}


def _numbers(metrics: Path, iteration: int | None) -> dict[str, float]:
    """Losses of the last line of metrics.jsonl up to the iteration, and the last validation's."""
    found: dict[str, float] = {}
    if iteration is None or not metrics.is_file() or metrics.stat().st_size > _MOST_METRICS:
        return found
    with metrics.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            at = record.get("iteration") if isinstance(record, dict) else None
            if not isinstance(at, int) or at > iteration:
                continue
            is_at = at == iteration
            found |= {
                tag: value
                for tag, value in record.items()
                if isinstance(value, float) and (tag.endswith(" validation") or (is_at and tag.endswith(" loss")))
            }
    return found


def _training(run: RunConfig) -> str:
    return f"""## Training

By [HACL](https://arxiv.org/abs/2312.06968)'s trainer on megatron-core:

```bash
{_command(run)}
```"""


def _command(run: RunConfig) -> str:
    """The flags that the run set, a line each; `torchrun`'s own are its machine's."""
    lines = ["torchrun ... -m hacl_megatron.train"]
    for name, kind in GROUPS.items():
        group = getattr(run, name)
        for item in fields(kind):
            default = item.default_factory() if item.default_factory is not MISSING else item.default
            value = getattr(group, item.name)
            if item.name in _OF_THIS_MACHINE or value == default or value is None:
                continue
            shown = [_name(str(one)) for one in value] if isinstance(value, list | tuple) else [_name(str(value))]
            lines.append(f"--{item.name.replace('_', '-')} {shlex.join(shown)}")
    for section, values in (("transformer", run.transformer), ("ddp", run.ddp), ("optimizer", run.optimizer_overrides)):
        lines += [f"# {section}: {printable(json.dumps(_without_paths(values), default=str))}"] if values else []
    flags = [line for line in lines if not line.startswith("#")]
    comments = [line for line in lines if line.startswith("#")]
    return "\n".join([*comments, " \\\n  ".join(flags)]).replace("```", "")


def _use(model_class: str) -> str:
    if model_class == "Blip2ForConditionalGeneration":
        return ""
    return """
## Use

```python
from transformers import pipeline

ask = pipeline("image-text-to-text", model="PATH OR NAME OF THIS MODEL")
content = [{"type": "image", "url": "picture.jpg"}, {"type": "text", "text": "What is in the picture?"}]
print(ask(text=[{"role": "user", "content": content}], max_new_tokens=64, return_full_text=False))
```

`hacl_heads.safetensors` holds the contrastive heads, which only the trainer and its tools read.
"""


def _table(rows: dict[str, str]) -> str:
    return "| | |\n| --- | --- |\n" + "".join(f"| {key} | {value} |\n" for key, value in rows.items())


def _names(paths: Iterable[str]) -> str:
    return ", ".join(_code(_name(path)) for path in paths)


def _name(path: str) -> str:
    """The last name of a path or address, without what may stand behind a `?`; a value that is no path as it is."""
    return re.split(r"[?#]", path)[0].rstrip("/").rpartition("/")[2] if "/" in path else path


def _without_paths(value: Any) -> Any:
    """A value of YAML, with the last names of the paths in it."""
    if isinstance(value, dict):
        return {key: _without_paths(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(one) for one in value]
    return _name(str(value)) if isinstance(value, str | Path) else value


def _code(text: str) -> str:
    return f"`{printable(text).replace('`', chr(39)).replace('|', '/')}`"


def _plain(text: str) -> str:
    """Text that is no markup."""
    return re.sub(r"([\\`*_{}\[\]()#+!|<>~])", r"\\\1", printable(text))
