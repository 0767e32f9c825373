"""What files call a tensor, by layout and age, against its canonical name (`hf.names`), in both directions.

model folder   LlavaForConditionalGeneration, the original LLaVA layout, Blip2ForConditionalGeneration, or a LLaMA
tower folder   a CLIP, a SigLIP or a BLIP-2 of which the vision tower is taken, and BLIP-2's Q-Former
adapter        LLaVA's mm_projector.bin, MiniGPT-4's llama_proj
"""

import re
from collections.abc import Iterable

from hacl_megatron.config.architecture import ModelConfig

Patterns = tuple[tuple[re.Pattern[str], str], ...]
"""Spelled -> canonical, first match wins."""


def _patterns(*rows: tuple[str, str]) -> Patterns:
    return tuple((re.compile(pattern), canonical) for pattern, canonical in rows)


TEXT = _patterns(
    (r"(?:language_model\.)?lm_head\.weight", r"text.lm_head.weight"),
    # transformers <= 4.51 and files of every version; 4.52's modules and 5's; a plain LLaMA and the original layout
    (r"(?:language_model\.model|model\.language_model(?:\.model)?|model)\.((?:embed_tokens|layers|norm)\..*)",
     r"text.\1"),
)  # fmt: skip
LLAVA = (
    *_patterns(
        # mm_projector.bin and the original layout; wrappers such as base_model.model. stand before it, as LLaVA
        # tolerates
        (r"(?:[\w.]+\.)?mm_projector\.(weight|bias)", r"projector.0.\1"),
        (r"(?:[\w.]+\.)?mm_projector\.(\d+)\.(weight|bias)", r"projector.\1.\2"),
        (r"(?:model\.)?multi_modal_projector\.linear_1\.(weight|bias)", r"projector.0.\1"),
        (r"(?:model\.)?multi_modal_projector\.linear_2\.(weight|bias)", r"projector.2.\1"),
        # the original layout nests two vision towers; transformers 5 dropped `vision_model.`
        (r"(?:model\.)?vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?"
         r"((?:embeddings|encoder|pre_layrnorm|post_layernorm|head)\..*)", r"vision.\1"),
    ),
    *TEXT,
)  # fmt: skip
BLIP2_TOWER = _patterns(
    (r"(?:model\.)?query_tokens", r"qformer.query_tokens"),
    (r"(?:model\.)?qformer\.(.*)", r"qformer.\1"),
    (r"(?:model\.)?vision_model\.(.*)", r"vision.\1"),
)
BLIP2 = (
    *BLIP2_TOWER,
    # transformers' own name, and MiniGPT-4's
    *_patterns((r"(?:[\w.]+\.)?(?:language_projection|llama_proj)\.(weight|bias)", r"projector.0.\1")),
    *TEXT,
)
# CLIPModel and 4.x's CLIPVisionModel have the prefix, 5.x's CLIPVisionModel has not; SigLIP likewise.
CLIP_TOWER = _patterns(
    (r"(?:vision_model\.)?((?:embeddings|encoder|pre_layrnorm|post_layernorm|head)\..*)", r"vision.\1"),
)
OTHER_SIDE = re.compile(r"text_model\..*|text_projection\.weight|visual_projection\.weight|logit_(?:scale|bias)")
QFORMER_TEXT_SIDE = re.compile(r"qformer\.(?:embeddings\.|encoder\.layer\.\d+\.(?:intermediate|output)\.).*")
BLIP2_LANGUAGE = re.compile(r"(?:model\.)?language_(?:model|projection)\..*")

WRITE_PREFIXES = {
    "hf": {"text.lm_head.": "language_model.lm_head.", "text.": "language_model.model.",
           "vision.": "vision_tower.vision_model.", "projector.0.": "multi_modal_projector.linear_1.",
           "projector.2.": "multi_modal_projector.linear_2.", "heads.": ""},
    "blip2": {"text.lm_head.": "language_model.lm_head.", "text.": "language_model.model.", "vision.": "vision_model.",
              "qformer.query_tokens": "query_tokens", "qformer.": "qformer.", "projector.0.": "language_projection.",
              "heads.": ""},
    "llava": {"text.lm_head.": "lm_head.", "text.": "model.",
              "vision.": "model.vision_tower.vision_tower.vision_model.", "projector.": "model.mm_projector.",
              "heads.": ""},
    "minigpt4": {"projector.0.": "llama_proj."},
    "tower": {"vision.": "vision_model.", "qformer.query_tokens": "query_tokens", "qformer.": "qformer."},
}  # fmt: skip
"""Canonical -> spelled. `hf` (and `blip2`, with a Q-Former) is what the hub's checkpoints say and what transformers 4.x
and 5.x both load."""


def canonical_name(config: ModelConfig, spelled: str, *, tower_folder: bool) -> str | None:
    """Canonical form of a name in a file, or None; it need not be one that a model of these sizes has."""
    if tower_folder:
        patterns = BLIP2_TOWER if is_blip2_tower(config) else CLIP_TOWER
    else:
        patterns = BLIP2 if config.qformer is not None else LLAVA
    for pattern, canonical in patterns:
        if match := pattern.fullmatch(spelled):
            return match.expand(canonical)
    return None


def spelled_name(config: ModelConfig, canonical: str, layout: str) -> str:
    """How a file of `layout` (a key of `WRITE_PREFIXES`) spells a canonical name. KeyError where it has none."""
    if layout == "hf" and config.qformer is not None:
        layout = "blip2"
    if layout == "llava" and config.projector_type == "linear" and canonical.startswith("projector."):
        return canonical.replace("projector.0.", "model.mm_projector.")
    for prefix, written in WRITE_PREFIXES[layout].items():
        if canonical.startswith(prefix):
            return written + canonical.removeprefix(prefix)
    raise KeyError(f"{canonical} has no name in the layout {layout}")


def reason_to_ignore(
    config: ModelConfig, spelled: str, canonical: str | None, *, carried: Iterable[str], tower_folder: bool
) -> str | None:
    """Why a tensor of a file has no place in a model of these sizes, or None if it should have one."""
    if spelled.endswith("rotary_emb.inv_freq"):
        return "buffer: rotary frequencies are computed"
    if spelled.endswith("embeddings.position_ids"):
        return "buffer: positions are computed"
    if canonical == "text.lm_head.weight" and config.language.tie_word_embeddings:
        return "tied: the embedding serves as LM head"
    if canonical in carried:
        return f"carried: behind the selected vision layer {config.vision_select_layer}"
    if canonical is None and OTHER_SIDE.fullmatch(spelled):
        return "the text side of CLIP or SigLIP"
    if QFORMER_TEXT_SIDE.fullmatch(spelled):
        return "the Q-Former's text side"
    if tower_folder and is_blip2_tower(config):
        if BLIP2_LANGUAGE.fullmatch(spelled):
            return "BLIP-2's own language model, and the projection into it"
        if config.qformer is None and (canonical or "").startswith("qformer."):
            return f"the Q-Former, which a connector {config.projector_type} goes without"
    return None


def is_blip2_tower(config: ModelConfig) -> bool:
    """Whether the vision tower is BLIP-2's, which stands in one folder with a Q-Former and a language model."""
    return (config.vision.hf or {}).get("model_type") == "blip_2_vision_model"
