"""`generation_config.json` of an exported folder, such that every transformers version loads and saves it."""

from typing import Any

from hacl_megatron.checkpoint.hf.json_files import one_line

SAMPLING = {
    "temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None, "top_h": None, "typical_p": 1.0,
    "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
}  # fmt: skip
"""Settings that act where `do_sample` is true, and the values at which they may stand beside greedy decoding."""
BEAMS = {
    "early_stopping": False, "length_penalty": 1.0, "num_beam_groups": 1, "diversity_penalty": 0.0, "constraints": None
}  # fmt: skip
"""Those of more than one beam."""


def generation_json(stored: dict[str, Any], tokens: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """`stored` with `tokens` laid over it, and without what has no effect: transformers 4.x refuses to save that.

    Vicuna's has `temperature` and `top_p` without `do_sample`, which decodes greedily, as it still does then.

    Args:
        stored: the source's, or {}.
        notes: get a line on what is left out.
    """
    given = {key: value for key, value in stored.items() if value is not None or key.endswith("_token_id")}
    for key in ("_from_model_config", "transformers_version"):
        given.pop(key, None)
    idle = {} if given.get("do_sample") is True else {key: "do_sample is not true" for key in SAMPLING}
    if given.get("num_beams", 1) == 1:
        idle |= {key: "num_beams is 1" for key in BEAMS}
    neutral = SAMPLING | BEAMS
    if dropped := [key for key in idle if key in given and given[key] != neutral[key]]:
        reasons = "; ".join(f"{key} {given[key]!r}: {idle[key]}" for key in dropped)
        notes.append(f"generation_config.json goes without what has no effect and cannot be saved ({reasons})")
    given = {key: value for key, value in given.items() if key not in dropped} | tokens
    if why := _why_invalid(given):
        notes.append(f"generation_config.json has token ids alone, for transformers refuses the source's ({why})")
        return dict(tokens)
    return given


def _why_invalid(values: dict[str, Any]) -> str | None:
    from transformers import GenerationConfig

    try:
        GenerationConfig(**values).validate(strict=True)
    except Exception as error:  # of several kinds, for values of any type
        return one_line(error)
    return None
