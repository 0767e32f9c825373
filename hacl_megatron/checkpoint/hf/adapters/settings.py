"""`adapter_config.json` of a LoRA folder: what it says that changes the model is obeyed, or refused by name.

Each module of peft's tree that `target_modules` matches has its pair of matrices in the folder; `covers` is that rule.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hacl_megatron.checkpoint.hf.json_files import one_line, read_json, refuse_unless
from hacl_megatron.config.connectors import CONNECTOR_FILES

ADAPTER_CONFIG = "adapter_config.json"
CONNECTOR_FILE = CONNECTOR_FILES[0]
"""LLaVA's, alone in the folder that its first stage leaves."""

_ALLOWED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False, None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    # The others (pissa, olora, loftq, corda, lora_ga) change the base's weights when peft loads the adapter.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
_OBEYED = (
    "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "modules_to_save", "exclude_modules",
    "layers_to_transform", "layers_pattern", "base_model_name_or_path",
)  # fmt: skip
_OF_NO_EFFECT = (
    "task_type", "inference_mode", "auto_mapping", "peft_version", "revision", "megatron_config", "megatron_core",
    "runtime_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying",
)  # fmt: skip
"""How the adapter was started or is run, not what it computes."""


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """What an `adapter_config.json` makes of its tensors."""

    where: Path
    rank: int
    alpha: float
    """As `lora_alpha` of plain LoRA: of rank-stabilised LoRA, times the root of the rank."""
    dropout: float
    base: str | None
    """`base_model_name_or_path`."""
    target_modules: str | tuple[str, ...]
    """A regular expression for a module's whole name, or ends of names."""
    modules_to_save: tuple[str, ...] = ()
    exclude_modules: str | tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    """`layers_to_transform`."""
    layers_pattern: tuple[str, ...] = ()

    @classmethod
    def of_folder(cls, folder: Path) -> "AdapterSettings":
        """Raises ValueError for a setting that plain LoRA of one rank is not."""
        where = folder / ADAPTER_CONFIG
        values = read_json(where)
        merge = "merge it with peft (merge_and_unload) and give the merged model"
        for key, choices in _ALLOWED.items():
            try:
                refuse_unless(where, values, {key: choices})
            except ValueError as error:
                raise ValueError(f"{error}; {merge}") from None
        for key, value in values.items():
            if value and key not in (*_ALLOWED, *_OBEYED, *_OF_NO_EFFECT):
                raise ValueError(
                    f"{where}: {key} is {one_line(repr(value))}; this trainer has LoRA of one rank and alpha without "
                    f"it; {merge}"
                )
        rank, alpha, dropout = values.get("r"), values.get("lora_alpha"), values.get("lora_dropout") or 0.0
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"{where}: r is {rank!r}; expected the adapters' rank, such as 128")
        for name, number, well in (
            ("lora_alpha", alpha, lambda number: 0 < number < math.inf),
            ("lora_dropout", dropout, lambda number: 0 <= number < 1),
        ):
            if isinstance(number, bool) or not isinstance(number, int | float) or not well(number):
                wanted = "a number above 0" if name == "lora_alpha" else "a number from 0 to below 1"
                raise ValueError(f"{where}: {name} is {number!r}; expected {wanted}")
        targets = values.get("target_modules")
        if not targets or not isinstance(targets, str | list):
            raise ValueError(f"{where}: target_modules is {targets!r}; expected names of modules, or a pattern of them")
        layers = values.get("layers_to_transform")
        layers = [layers] if isinstance(layers, int) else layers or []
        if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
            raise ValueError(f"{where}: layers_to_transform is {layers!r}; expected numbers of layers")
        return cls(
            where=where,
            rank=rank,
            alpha=alpha * math.sqrt(rank) if values.get("use_rslora") else alpha,
            dropout=dropout,
            base=values.get("base_model_name_or_path"),
            target_modules=_names(where, "target_modules", targets),
            modules_to_save=tuple(_names(where, "modules_to_save", values.get("modules_to_save") or [])),
            exclude_modules=_names(where, "exclude_modules", values.get("exclude_modules") or []),
            layers=tuple(layers) or None,
            layers_pattern=_listed(_names(where, "layers_pattern", values.get("layers_pattern") or [])),
        )

    @property
    def scale(self) -> float:
        """Of B A."""
        return self.alpha / self.rank

    def covers(self, module: str) -> bool:
        """Whether peft puts an adapter beside the module of that name, such as `model.layers.3.self_attn.q_proj`."""
        if self._matches(self.exclude_modules, module):
            return False
        if self.target_modules == "all-linear":
            return True
        if not self._matches(self.target_modules, module):
            return False
        if isinstance(self.target_modules, str) or self.layers is None:
            return True
        patterns = self.layers_pattern or ("[^.]*",)
        found = next(filter(None, (re.match(rf"(?:^|.*?\.){one}\.(\d+)\.", module) for one in patterns)), None)
        return found is not None and int(found[1]) in self.layers

    def _matches(self, names: str | tuple[str, ...], module: str) -> bool:
        if not isinstance(names, str):
            return module.endswith(tuple(f".{name}" for name in names)) or module in names
        try:
            return re.fullmatch(names, module) is not None
        except re.error as error:
            raise ValueError(f"{self.where}: {names!r} is no regular expression ({error})") from None


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder holds LoRA, or a connector alone, and needs a base."""
    if (folder / ADAPTER_CONFIG).is_file():
        return True
    weights = ("model*.safetensors*", "pytorch_model*")
    return (folder / CONNECTOR_FILE).is_file() and not any(any(folder.glob(pattern)) for pattern in weights)


def refuse_adapter_folder(folder: Path) -> None:
    """ValueError for a folder that is read over a base, where a whole model is wanted."""
    if is_adapter_folder(folder):
        found = "LoRA adapters" if (folder / ADAPTER_CONFIG).is_file() else "a connector"
        raise ValueError(
            f"{folder} holds {found} alone, no whole model; lay it over its base first: "
            f"tools/convert_hf_to_megatron.py --hf-path {folder} --model-base BASE --save OUT, and go on with OUT"
        )


def _names(where: Path, key: str, value: Any) -> str | tuple[str, ...]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{where}: {key} is {one_line(repr(value))}; expected a list of names")
    return tuple(value)


def _listed(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names
