"""What files call a tensor, by layout and age, against its canonical name (`hf.names`), in both directions.

model folder   LlavaForConditionalGeneration, the original LLaVA layout, Blip2ForConditionalGeneration, or a LLaMA
tower folder   a CLIP, a SigLIP or a BLIP-2 of which the vision tower is taken, and BLIP-2's Q-Former: `config.towers`
adapter        LLaVA's mm_projector.bin, MiniGPT-4's llama_proj
"""

import re
from collections.abc import Iterable
from functools import cache

from hacl_megatron.config.architecture import ModelConfig
from hacl_megatron.config.families import LanguageFamily, language_family
from hacl_megatron.config.towers import BLIP2

NEWLINE = "projector.image_newline"
"""Canonical name of the row that ends each line of an image in tiles; files have it beside the connector."""

Patterns = tuple[tuple[str, str], ...]
"""Spelled -> canonical, first match wins."""

LLAVA_PARTS: Patterns = (
    # mm_projector.bin and the original layout; wrappers such as base_model.model. stand before it, as LLaVA
    # tolerates
    (r"(?:[\w.]+\.)?mm_projector\.(weight|bias)", r"projector.0.\1"),
    (r"(?:[\w.]+\.)?mm_projector\.(\d+)\.(weight|bias)", r"projector.\1.\2"),
    # at the top up to transformers 4.51 and in files of every version; in `model.` since, and in the original layout
    (r"(?:[\w.]+\.)?image_newline", NEWLINE),
    (r"(?:model\.)?multi_modal_projector\.linear_1\.(weight|bias)", r"projector.0.\1"),
    (r"(?:model\.)?multi_modal_projector\.linear_2\.(weight|bias)", r"projector.2.\1"),
    # the original layout nests two vision towers; transformers 5 dropped `vision_model.`
    (r"(?:model\.)?vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?(.*)", r"vision.\1"),
)
BLIP2_PARTS: Patterns = (
    *BLIP2.spellings,
    # transformers' own name, and MiniGPT-4's
    (r"(?:[\w.]+\.)?(?:language_projection|llama_proj)\.(weight|bias)", r"projector.0.\1"),
)
QFORMER_TEXT_SIDE = r"qformer\.(?:embeddings\.|encoder\.layer\.\d+\.(?:intermediate|output)\.).*"

WRITE_PREFIXES = {
    "hf": {"lm_head": "language_model.", "text.": "language_model.model.", "vision.": "vision_tower.WRAPPER",
           "projector.0.": "multi_modal_projector.linear_1.", "projector.2.": "multi_modal_projector.linear_2.",
           NEWLINE: "image_newline", "heads.": ""},
    "blip2": {"lm_head": "language_model.", "text.": "language_model.model.", "vision.": "vision_model.",
              "qformer.query_tokens": "query_tokens", "qformer.": "qformer.", "projector.0.": "language_projection.",
              "heads.": ""},
    "llava": {"lm_head": "", "text.": "model.", "vision.": "model.vision_tower.vision_tower.WRAPPER",
              NEWLINE: "model.image_newline", "projector.": "model.mm_projector.", "heads.": ""},
    "minigpt4": {"projector.0.": "llama_proj."},
    "tower": {"vision.": "WRAPPER", "qformer.query_tokens": "query_tokens", "qformer.": "qformer."},
}  # fmt: skip
"""Canonical -> spelled, `lm_head` what stands before the family's name of it, WRAPPER the tower's own. `hf` (and
`blip2`, with a Q-Former) is what the hub's checkpoints say and what transformers 4.x and 5.x both load."""


@cache
def _text(family: LanguageFamily) -> Patterns:
    modules = "|".join(map(re.escape, family.modules))
    return (
        (rf"(?:language_model\.)?({re.escape(family.lm_head)})", r"text.\1"),
        # transformers <= 4.51 and files of every version; 4.52's modules and 5's; a plain LLaMA and the original layout
        (rf"(?:language_model\.model|model\.language_model(?:\.model)?|model)\.((?:{modules})\..*)", r"text.\1"),
    )


def canonical_name(config: ModelConfig, spelled: str, *, tower_folder: bool) -> str | None:
    """Canonical form of a name in a file, or None; it need not be one that a model of these sizes has."""
    if tower_folder:
        patterns = config.vision.kind.spellings
    else:
        parts = LLAVA_PARTS if config.qformer is None else BLIP2_PARTS
        patterns = (*parts, *_text(language_family(config.language.family)))
    for pattern, canonical in patterns:
        if match := re.fullmatch(pattern, spelled):
            return match.expand(canonical)
    return None


def spelled_name(config: ModelConfig, canonical: str, layout: str) -> str:
    """How a file of `layout` (a key of `WRITE_PREFIXES`) spells a canonical name. KeyError where it has none."""
    if layout == "hf" and config.qformer is not None:
        layout = "blip2"
    if layout == "llava" and config.projector_type == "linear" and canonical.startswith("projector."):
        return canonical.replace("projector.0.", "model.mm_projector.")
    prefixes = WRITE_PREFIXES[layout]
    lm_head = language_family(config.language.family).lm_head
    if canonical == f"text.{lm_head}" and "lm_head" in prefixes:
        return prefixes["lm_head"] + lm_head
    for prefix, written in prefixes.items():
        if canonical.startswith(prefix):
            return written.replace("WRAPPER", config.vision.kind.wrapper) + canonical.removeprefix(prefix)
    raise KeyError(f"{canonical} has no name in the layout {layout}")


def reason_to_ignore(
    config: ModelConfig, spelled: str, canonical: str | None, *, carried: Iterable[str], tower_folder: bool
) -> str | None:
    """Why a tensor of a file has no place in a model of these sizes, or None if it should have one."""
    if spelled.endswith("rotary_emb.inv_freq"):
        return "buffer: rotary frequencies are computed"
    if spelled.endswith("embeddings.position_ids"):
        return "buffer: positions are computed"
    lm_head = language_family(config.language.family).lm_head
    if canonical == f"text.{lm_head}" and config.language.tie_word_embeddings:
        return "tied: the embedding serves as LM head"
    if canonical in carried:
        return f"carried: behind the selected vision layer {config.vision_select_layer}"
    if re.fullmatch(QFORMER_TEXT_SIDE, spelled):
        return "the Q-Former's text side"
    if not tower_folder:
        return None
    for pattern, reason in config.vision.kind.ignored:
        if re.fullmatch(pattern, spelled):
            return reason
    if config.qformer is None and (canonical or "").startswith("qformer."):
        return f"the Q-Former, which a connector {config.projector_type} goes without"
    return None
