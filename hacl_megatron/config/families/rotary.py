"""Rotary positions as config.json states them, in both spellings, and what of their scalings is plain arithmetic."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NEEDED: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""Rope types beside `default` -> numbers above 0 that each cannot do without."""
OPTIONAL: dict[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
}
NOT_TURNED = ("partial_rotary_factor", "mrope_section")
"""Keys that leave part of a head as it is, or turn its parts by different positions; where they mean something they
are refused."""


def read_rotary(values: Mapping[str, Any], where: Path) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling, from `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (4.x).

    Where both stand, `rope_scaling` wins and `rope_theta` fills in, as transformers 5 reads them.

    Raises:
        ValueError: another rope type than those above, or what it needs is missing or no number above 0.
    """
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: the scaling of rotary positions is {str(given)[:80]!r}; expected an object")
    merged = dict(given)
    base = merged.pop("rope_theta", None)
    base = values.get("rope_theta") if base is None else base
    if base is not None and not _is_positive(base):
        raise ValueError(f"{where}: rope_theta is {str(base)[:80]!r}; expected a number above 0")
    kind = merged.pop("rope_type", None) or merged.pop("type", None) or "default"
    merged.pop("type", None)
    for key in NOT_TURNED:
        found = merged.get(key) if key in merged else values.get(key)
        if found not in (None, 1):
            raise ValueError(
                f"{where}: {key} is {str(found)[:80]}; this trainer turns whole heads by one position only"
            )
    rotary_base = float(10000.0 if base is None else base)
    if kind == "default":
        return rotary_base, None
    if kind == "yarn" and merged.get("original_max_position_embeddings") is None:
        merged["original_max_position_embeddings"] = values.get("max_position_embeddings")
    scaling = {"rope_type": kind, **{key: value for key, value in merged.items() if value is not None}}
    if why := wrong_scaling(scaling):
        raise ValueError(f"{where}: {why}")
    return rotary_base, {key: scaling[key] for key in ("rope_type", *NEEDED[kind], *OPTIONAL.get(kind, ()))
                         if key in scaling}  # fmt: skip


def wrong_scaling(scaling: Mapping[str, Any]) -> str | None:
    """Why the frequencies of that scaling (`LanguageConfig.rope_scaling`) cannot be computed, or None."""
    kind = scaling.get("rope_type")
    if not isinstance(kind, str) or kind not in NEEDED:
        known = ", ".join(map(repr, ("default", *NEEDED)))
        return f"rope type is {str(kind)[:80]!r}; this trainer supports {known} only"
    if missing := [key for key in NEEDED[kind] if key not in scaling]:
        return f"{kind} rope scaling lacks {', '.join(missing)}"
    for key in (*NEEDED[kind], *OPTIONAL.get(kind, ())):
        found = scaling.get(key)
        if key in scaling and not (isinstance(found, bool) if key == "truncate" else _is_positive(found)):
            expected = "true or false" if key == "truncate" else "a number above 0"
            return f"{key} of the {kind} rope scaling is {str(found)[:80]!r}; expected {expected}"
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        return "high_freq_factor of the llama3 rope scaling is not above its low_freq_factor"
    return None


def write_rotary(base: float, scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    """Both spellings: transformers 4.x knows the first two, 5.x the third."""
    return {
        "rope_theta": base,
        **({"rope_scaling": dict(scaling)} if scaling else {}),
        "rope_parameters": {"rope_type": "default", "rope_theta": base, **(scaling or {})},
    }


def attention_factor(scaling: Mapping[str, Any] | None) -> float:
    """What YaRN multiplies rotated queries and keys by, 1 for every other scaling.

    Source: transformers `modeling_rope_utils._compute_yarn_parameters`, after Peng et al. (arXiv 2309.00071), 3.4.
    """
    if scaling is None or scaling["rope_type"] != "yarn":
        return 1.0
    if (given := scaling.get("attention_factor")) is not None:
        return float(given)
    factor, above, below = scaling["factor"], scaling.get("mscale"), scaling.get("mscale_all_dim")

    def grown(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    return grown(above) / grown(below) if above and below else grown(1.0)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
