"""Whether what a run trains can be exported: asked before its first step, since the answer cannot change."""

import tempfile
from pathlib import Path

from hacl_megatron.checkpoint.hf.assets.write import Assets, ChatTemplate
from hacl_megatron.checkpoint.hf.config_read import read_model_config
from hacl_megatron.checkpoint.hf.config_write import Layout, to_config_json, tower_name, why_not_layout
from hacl_megatron.checkpoint.hf.json_files import one_line, write_json
from hacl_megatron.checkpoint.hf.tower_config import TOWER_FOLDER
from hacl_megatron.checkpoint.run.folder import asset_files
from hacl_megatron.config.run import RunConfig


def check_export(config: RunConfig, assets: Path, chat_template: ChatTemplate | None) -> list[str]:
    """Write all of the run's export but its weights, and read it again. Returns what a user should know of it.

    The layout is Hugging Face's where that has such a model, else the original one. Where neither has, the connector
    alone can be exported, and the lines say so.

    Args:
        config: resolved.
        assets: folder that tokenizer and image processor come from.
        chat_template: of `--version`.

    Raises:
        ValueError: the run's checkpoints could not be exported, or not even hold these assets.
    """
    model, tokenizer = config.architecture, config.model.tokenizer
    asset_files(assets, tokenizer)
    why_not = {layout: why_not_layout(model, layout) for layout in ("hf", "llava")}
    layout: Layout | None = next((layout for layout, why in why_not.items() if why is None), None)
    if layout is None:
        return [f"no whole export of this model is possible, only --format projector: {why_not['hf']}"]
    named = TOWER_FOLDER if layout == "llava" and tower_name(model) is None else None
    try:
        beside = Assets(
            folder=assets,
            tokenizer=None if tokenizer is None else Path(tokenizer),
            config=model,
            layout=layout,
            chat_template=chat_template,
        )
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder)
            aspect = config.data.image_aspect_ratio
            write_json(out / "config.json", to_config_json(
                model, layout, dtype="bfloat16" if config.model.bf16 else "float32", image_aspect_ratio=aspect,
                vocabulary=beside.vocabulary, vision_tower=named,
            ))  # fmt: skip
            beside.write(out, image_aspect_ratio=aspect)
            if layout == "hf":
                read_model_config(out)
    except ValueError as error:
        raise ValueError(
            f"what this run trains could not be exported: {one_line(error)}; mend that first, for a checkpoint cannot"
        ) from None
    return beside.notes
