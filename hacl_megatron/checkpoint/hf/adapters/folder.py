"""A folder of LoRA, or of a connector alone, read over its base.

LLaVA's LoRA     adapter_config.json, adapter_model.bin, non_lora_trainables.bin, config.json; the base is a LLaMA
                 (Vicuna) or a LLaVA in the original layout
peft's           adapter_config.json, adapter_model.safetensors; over a LlavaForConditionalGeneration, or any of those
LLaVA's stage 1  mm_projector.bin, config.json; over a LLaMA

adapters' names ─ without peft's wrappers ─ canonical ─┬─ A, B of a matrix: merged on reading, or kept ┐
                                                       └─ whole tensors: laid over the base's ─────────┴→ SourceTensors
"""

import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from hacl_megatron.checkpoint.hf.adapters.low_rank import KeptLora, LowRank, lora_targets
from hacl_megatron.checkpoint.hf.adapters.settings import (
    ADAPTER_CONFIG,
    CONNECTOR_FILE,
    AdapterSettings,
    is_adapter_folder,
)
from hacl_megatron.checkpoint.hf.config_read import (
    language_config,
    layout_of,
    llava_connector,
    read_model_config,
    says_tied,
)
from hacl_megatron.checkpoint.hf.import_weights import HEADS_FILE, SourceTensors, add_heads, open_sources
from hacl_megatron.checkpoint.hf.json_files import read_json
from hacl_megatron.checkpoint.hf.names import NameTable, nearest
from hacl_megatron.checkpoint.hf.spellings import NEWLINE
from hacl_megatron.checkpoint.hf.tiled_models import read_original_tiles
from hacl_megatron.checkpoint.hf.weight_files import WeightFiles
from hacl_megatron.config.architecture import LanguageConfig, ModelConfig
from hacl_megatron.config.lora import TARGETS, Lora
from hacl_megatron.config.tiles import TilesConfig

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
"""In peft's order."""
OTHER_TRAINED = "non_lora_trainables.bin"
"""LLaVA's: what trained beside the adapters, which is the connector."""
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_PAIR = re.compile(r"(.*)\.lora_([AB])(?:\.default)?\.weight")

Place = tuple[WeightFiles, str]
"""A tensor's file, and its name there."""


def find_model_base(folder: Path, given: Path | None) -> Path:
    """The folder that `folder` is laid over: the given one, or the one that it names if that is here.

    Raises:
        ValueError: neither, or it needs a base itself.
    """
    if not is_adapter_folder(folder):
        raise ValueError(
            f"{folder} needs no base: neither {ADAPTER_CONFIG} nor {CONNECTOR_FILE} alone; leave --model-base out"
        )
    if given is None:
        named = [read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")] if _has_lora(folder) else []
        if (folder / "config.json").is_file():
            named.append(read_json(folder / "config.json").get("_name_or_path"))
        found = next((Path(name) for name in named if isinstance(name, str) and Path(name).is_dir()), None)
        if found is None:
            words = " or ".join(sorted({str(name) for name in named if name}))
            raise ValueError(
                f"{folder} holds a part of a model" + (f", whose base {words} is no folder here" if words else "")
                + "; give the base by --model-base DIR"
            )  # fmt: skip
        given = found
    if is_adapter_folder(given):
        raise ValueError(f"--model-base {given} holds a part of a model itself; convert and export it whole first")
    return given


def read_adapted_config(folder: Path, base: Path, vision_tower: Path | None = None) -> ModelConfig:
    """Sizes of the model that `folder` makes of `base`.

    As in LLaVA's code the adapters' config.json says them, where it is one of LLaVA's and the base is not transformers'
    LLaVA; else the base's, with which the adapters' must agree.

    Raises:
        ValueError: see `read_model_config`; or one of the two describes another model.
    """
    own, of_base = folder / "config.json", read_json(base / "config.json")
    base_layout = layout_of(of_base, base)
    layout = layout_of(read_json(own), folder) if own.is_file() else None
    if layout is None and base_layout != "hf" and not _has_lora(folder):
        raise ValueError(
            f"{own}: no such file; expected LLaVA's, or give {CONNECTOR_FILE} by --pretrain-mm-mlp-adapter"
        )
    if layout == "llava" and base_layout != "hf":
        config = read_model_config(folder, vision_tower, weights=base)
        _refuse_other_language(config.language, language_config(of_base, base / "config.json", says_tied(of_base)), own)
        return config
    config = read_model_config(base, vision_tower)
    if layout is None:
        return config
    values = read_json(own)
    language = language_config(values.get("text_config") or values, own, says_tied(values))
    # The hub's conversion to transformers' layout has more rows.
    _refuse_other_language(language, config.language, own, but=("vocab_size",) if layout == "llava" else ())
    if layout == "llava":
        found, expected = llava_connector(values, own), (config.projector_type, config.vision_select_layer)
        if found != expected:
            raise ValueError(f"{own}: connector and vision layer are {found}, but those of {base} are {expected}")
        _refuse_other_tiles(read_original_tiles(values, own), config.tiles, own, base)
        if config.tiles is None:
            aspect = values.get("image_aspect_ratio") or "square"
            config = replace(config, extra={**config.extra, "image_aspect_ratio": aspect})
    return config


def _refuse_other_tiles(found: TilesConfig | None, expected: TilesConfig | None, own: Path, base: Path) -> None:
    # The hub's conversions to transformers' layout have the original's pairs, (width, height), for (height, width).
    grids = [tiles and sorted(tiles.pinpoints) for tiles in (found, expected)]
    if grids[0] != grids[1]:
        cuts = [f"into tiles by {grid}" if grid else "into no tiles" for grid in grids]
        raise ValueError(f"{own}: it cuts pictures {cuts[0]}, but {base} cuts them {cuts[1]}")


def open_adapted_sources(
    folder: Path,
    base: Path,
    config: ModelConfig,
    *,
    adapter: Path | None = None,
    vision_tower: Path | None = None,
    keep: bool = False,
) -> SourceTensors:
    """Every tensor of base and adapters, named and checked, without reading one.

    Args:
        config: of `read_adapted_config`.
        adapter: see `open_sources`.
        vision_tower: see `open_sources`.
        keep: LoRA stays beside the weights (`SourceTensors.kept`), else it is laid into what is read.

    Raises:
        ValueError: see `open_sources`; a tensor that is unknown or missing, of another rank, or, with `keep`, LoRA that
            is not beside the same matrices of every language layer.
    """

    def lay_over(sources: SourceTensors) -> None:
        _Adapters(folder, sources, keep).lay_over()

    return open_sources(base, config, adapter=adapter, vision_tower=vision_tower, lay_over=lay_over)


def _has_lora(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file()


def _refuse_other_language(
    found: LanguageConfig, expected: LanguageConfig, where: Path, but: tuple[str, ...] = ()
) -> None:
    mine, theirs = asdict(found), asdict(expected)
    for key, value in mine.items():
        # Tied or not, the weights tell; a context's length changes no weight and no logit.
        if key not in ("tie_word_embeddings", "max_position_embeddings", *but) and value != theirs[key]:
            raise ValueError(
                f"{where}: {key} is {value!r}, but the base's is {theirs[key]!r}; expected the base that the adapters "
                "were trained on"
            )


class _Adapters:
    """The tensors of one such folder, on their way into `sources`."""

    def __init__(self, folder: Path, sources: SourceTensors, keep: bool):
        self.folder, self.sources, self.table, self.keep = folder, sources, sources.table, keep
        self.settings = AdapterSettings.of_folder(folder) if _has_lora(folder) else None
        if keep and self.settings is None:
            raise ValueError(f"{folder} has no LoRA to keep (no {ADAPTER_CONFIG}); leave --lora out")
        self.pairs: dict[str, dict[str, Place]] = {}
        """Canonical name of a matrix -> "A" and "B"."""
        self.modules: dict[str, str] = {}
        """Canonical name of a matrix -> its module's name in the tree that peft wrapped."""
        self.whole: dict[str, Place] = {}

    def lay_over(self) -> None:
        for path in self._files():
            weights = WeightFiles([path])
            for name in weights:
                self._take(weights, name)
            self.sources.files.append(str(path))
        self._check_whole()
        self.sources.found.update(self.whole)
        if (self.folder / HEADS_FILE).is_file():
            add_heads(self.sources, self.folder / HEADS_FILE)
        if self.settings is None:
            return
        self._check_pairs()
        pairs = {
            canonical: LowRank(a=pair["A"], b=pair["B"], scale=self.settings.scale)
            for canonical, pair in self.pairs.items()
        }
        if self.keep:
            self.sources.kept = KeptLora(lora=self._kept_lora(), pairs=pairs)
            self.sources.notes.append(f"{self.sources.kept.lora} kept")
        else:
            self.sources.merged.update(pairs)
            self.sources.notes.append(
                f"LoRA of rank {self.settings.rank}, alpha {self.settings.alpha:g}, merged into {len(pairs)} matrices"
            )

    def _files(self) -> list[Path]:
        """What is read; notes on, or a refusal of, whatever else holds tensors."""
        folder, notes = self.folder, self.sources.notes
        files = []
        if self.settings is not None:
            files = [folder / name for name in ADAPTER_FILES if (folder / name).is_file()]
            if not files:
                raise ValueError(f"{folder}: no LoRA weights there; expected {' or '.join(ADAPTER_FILES)}")
            for other in files[1:]:
                notes.append(f"{files[0]} is read, as peft does, and not {other.name} beside it")
            files = files[:1]
        files += [folder / name for name in (OTHER_TRAINED, CONNECTOR_FILE) if (folder / name).is_file()]
        known = {*ADAPTER_FILES, OTHER_TRAINED, CONNECTOR_FILE, HEADS_FILE}
        names = sorted(path.name for path in folder.iterdir() if path.name not in known)
        for name in names:
            if name.endswith(".safetensors") or name.startswith("pytorch_model"):
                raise ValueError(
                    f"{folder / name}: weights of a model beside those of its adapters; expected them in a folder of "
                    "their own, for --model-base"
                )
        if states := [name for name in names if name.endswith((".bin", ".pt", ".pth"))]:
            notes.append(f"not read: {', '.join(states)} in {folder}, no weights of a model by their names")
        return files

    def _take(self, weights: WeightFiles, name: str) -> None:
        spelled = re.sub(r"\.(?:modules_to_save(?:\.default)?|base_layer)(?=\.)", "", name)
        spelled = spelled.removeprefix("base_model.model.")
        pair = _PAIR.fullmatch(spelled)
        if pair is None and "lora_" in spelled:
            raise ValueError(
                f"{weights.file_of(name)}: {name} is no A or B of a linear layer; merge it with peft "
                "(merge_and_unload) and give the merged model"
            )
        spelled = spelled if pair is None else f"{pair[1]}.weight"
        canonical = self.table.canonical(spelled)
        reason = self.table.ignored_reason(spelled, canonical)
        if reason is not None and reason.startswith("buffer"):
            self.sources.ignored[name] = reason
            return
        if reason is not None and reason.startswith("tied"):
            raise ValueError(
                f"{weights.file_of(name)}: {name} is the LM head's, but config.json says that the embedding serves as "
                "head; merge it with peft (merge_and_unload) and give the merged model"
            )
        shape = self.table.expected.get(canonical) or self.table.carried.get(canonical)
        if shape is None or canonical.startswith("heads.") or (pair is not None and len(shape) != 2):
            close = nearest(spelled, [name for layout in ("hf", "llava") for name in self.sources.spellings(layout)])
            raise ValueError(
                f"{weights.file_of(name)}: {name} belongs to no {'linear layer' if pair else 'part'} of this model"
                + (f"; nearest expected: {close}" if close else "")
            )
        slot, key = (self.whole, canonical) if pair is None else (self.pairs.setdefault(canonical, {}), pair[2])
        if key in slot:
            raise ValueError(f"{weights.file_of(name)}: {name} and {slot[key][1]} are the same tensor twice")
        slot[key] = weights, name
        if pair is not None:
            self.modules[canonical] = pair[1]

    def _check_whole(self) -> None:
        """The connector is whole, and so are peft's modules_to_save; the newline may be the base's, for LLaVA's LoRA
        leaves it frozen."""
        connector = {name for name in self.table.expected if name.startswith("projector.")}
        if NEWLINE in connector and NEWLINE not in self.whole:
            connector.remove(NEWLINE)
            if connector & self.whole.keys():
                self.sources.notes.append(f"{self.folder} has no image_newline: the base's is taken")
        if (found := connector & self.whole.keys()) and found != connector:
            lacks = self.table.spelled(min(connector - found), "llava")
            raise ValueError(f"{self.folder}: its connector lacks {lacks}")
        if not found and self.settings is None:
            raise ValueError(f"{self.folder / CONNECTOR_FILE} holds no connector; expected model.mm_projector.0.weight")
        if not found and self.table.config.extra.get("layout") == "llava":
            if not connector & self.sources.found.keys():
                raise ValueError(
                    f"{self.folder}: no connector, neither in it ({OTHER_TRAINED} is missing) nor in its base"
                )
            self.sources.notes.append(f"{self.folder} has no connector ({OTHER_TRAINED}): the base's is taken")
        for module in self.settings.modules_to_save if self.settings else ():
            if not any(f".{module}." in f".{name}" for _, name in self.whole.values()):
                raise ValueError(
                    f"{self.settings.where}: modules_to_save names {module}, but no tensor of it is in {self.folder}"
                )

    def _check_pairs(self) -> None:
        """A and B of the one rank, beside every matrix that `target_modules` matches and beside no other."""
        settings = self.settings
        shapes = {**self.table.expected, **self.table.carried}
        for canonical, pair in self.pairs.items():
            module = self.modules[canonical]
            for kind, expected in (
                ("A", (settings.rank, shapes[canonical][1])),
                ("B", (shapes[canonical][0], settings.rank)),
            ):
                if kind not in pair:
                    raise ValueError(f"{self.folder}: {module}.lora_{kind}.weight is missing")
                weights, name = pair[kind]
                weights.dtype(name)
                if (found := weights.shape(name)) != expected:
                    raise ValueError(
                        f"{weights.file_of(name)}: {name} is {list(found)}, but {ADAPTER_CONFIG} (r {settings.rank}) "
                        f"and the base's sizes make it {list(expected)}"
                    )
            if not settings.covers(module):
                raise ValueError(
                    f"{settings.where}: target_modules does not match {module}, of which {self.folder} has LoRA; peft "
                    "would leave it out"
                )
        if not self.pairs:
            raise ValueError(f"{self.folder}: no lora_A or lora_B among its tensors")
        for module in self._missing():
            raise ValueError(
                f"{self.folder}: LoRA of {module} is missing, though target_modules of {ADAPTER_CONFIG} matches it; "
                "the folder may be incomplete"
            )
        if not isinstance(settings.target_modules, str):
            ends = {module.rpartition(".")[2] for module in self.modules.values()}
            for target in settings.target_modules:
                if target.rpartition(".")[2] in ends:
                    continue
                if target in TARGETS and settings.layers is None and not settings.exclude_modules:
                    raise ValueError(
                        f"{settings.where}: target_modules names {target}, but {self.folder} has no LoRA of it; the "
                        "folder may be incomplete"
                    )
                self.sources.notes.append(f"target_modules names {target}, of which {self.folder} has no LoRA")

    def _missing(self) -> Iterator[str]:
        """Modules without LoRA that `target_modules` matches, like ones with it but for the layer's number."""
        families: dict[str, set[str]] = {}
        for canonical in [*self.table.expected, *self.table.carried]:
            families.setdefault(_numberless(canonical), set()).add(canonical)
        for family in dict.fromkeys(_numberless(canonical) for canonical in self.pairs):
            there = next(canonical for canonical in self.pairs if _numberless(canonical) == family)
            for canonical in sorted(families[family] - self.pairs.keys()):
                numbers = _NUMBER.findall(canonical)
                if len(_NUMBER.findall(self.modules[there])) != len(numbers):  # a connector's, numbered otherwise
                    break
                remaining = iter(numbers)
                module = _NUMBER.sub(lambda _, remaining=remaining: next(remaining), self.modules[there])
                if self.settings.covers(module):
                    yield module

    def _kept_lora(self) -> Lora:
        targets = _language_targets(self.table)
        for canonical in self.pairs:
            if canonical not in targets:
                raise ValueError(
                    f"{self.folder}: LoRA of {self.modules[canonical]} cannot be kept, for adapters are beside "
                    "language layers only; give --lora merge"
                )
        there = {targets[canonical] for canonical in self.pairs}
        for canonical, target in targets.items():
            if target in there and canonical not in self.pairs:
                raise ValueError(
                    f"{self.folder}: some layers have LoRA of {target}, but {canonical.removesuffix('.weight')} has "
                    "none, and adapters are kept in all layers or none; give --lora merge"
                )
        settings = self.settings
        return Lora(
            rank=settings.rank,
            alpha=settings.alpha,
            dropout=settings.dropout,
            targets=tuple(target for target in TARGETS if target in there),
        )


def _language_targets(table: NameTable) -> dict[str, str]:
    return {
        source: target
        for rule in table.rules.values()
        for source, target in lora_targets(rule.ours, rule.sources).items()
    }


def _numberless(name: str) -> str:
    return _NUMBER.sub("#", name)
