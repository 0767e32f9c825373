"""All tasks by their names, and how those over a manifest are made."""

from collections.abc import Iterable, Mapping

from hacl_megatron.config.checks.flags import EVAL_TASKS
from hacl_megatron.data.encoding import EncodingSettings
from hacl_megatron.data.manifest import Manifest
from hacl_megatron.data.tokenizer import Tokenizer
from hacl_megatron.evaluation.likelihood.preference import Preference
from hacl_megatron.evaluation.likelihood.retrieval import Retrieval
from hacl_megatron.evaluation.likelihood.task import ManifestTask, Task
from hacl_megatron.evaluation.likelihood.yesno import YesNo

TASKS: dict[str, type[Task]] = {kind.name: kind for kind in (Preference, Retrieval, YesNo)}
"""What `--tasks` of tools/evaluate.py may name."""
MANIFEST_TASKS = tuple(name for name, kind in TASKS.items() if issubclass(kind, ManifestTask))
"""Those over samples of LLaVA JSON files; what `--eval-tasks` may name."""
assert MANIFEST_TASKS == EVAL_TASKS


def manifest_tasks(
    names: Iterable[str],
    manifest: Manifest,
    tokenizer: Tokenizer,
    settings: EncodingSettings,
    *,
    limit: int | None,
    options: Mapping[str, Mapping] | None = None,
) -> dict[str, Task]:
    """The tasks of these names over one manifest, `options` for the constructors by name. Raises ValueError."""
    return {
        name: TASKS[name](manifest, tokenizer, settings, limit=limit, **(options or {}).get(name, {})) for name in names
    }
