"""The controlled world of examples/proof."""

from pathlib import Path

PROOF = Path(__file__).parents[3] / "examples" / "proof"
SIZES = {
    "parts": 48, "pretrain": 32, "finetune": 16, "dev": 8, "test": 12, "habit_pretrain": 40, "habit_finetune": 24,
    "habit_prefer": 24,
}  # fmt: skip
