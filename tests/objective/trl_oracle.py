"""TRL's `DPOTrainer._compute_loss` on given log-probabilities, without what the package wants installed."""

import ast
import importlib.util
import math
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F


def trl_dpo(
    chosen: list[Tensor], rejected: list[Tensor], reference: Tensor, *, beta: float
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a batch, and what TRL logs of it.

    chosen, rejected: of each pair the log-probabilities of the answer's tokens. reference: [P, 2], their sums by the
    reference model.
    """
    answers = [*chosen, *rejected]
    width = max(map(len, answers)) + 1  # a token of a prompt in front
    completion_mask = torch.zeros(len(answers), width, dtype=torch.int64)
    for row, answer in zip(completion_mask, answers, strict=True):
        row[1 : 1 + len(answer)] = 1
    log_probs = torch.stack([F.pad(answer, (0, width - 1 - len(answer))) for answer in answers])
    zeros = torch.zeros_like(log_probs)
    outputs = SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather=_of_one_rank, gather_for_metrics=_of_one_rank),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=0.0,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": completion_mask,
        "attention_mask": completion_mask,
        "completion_mask": completion_mask,
        "ref_chosen_logps": reference[:, 0],
        "ref_rejected_logps": reference[:, 1],
    }
    loss = _compute_loss()(trainer, lambda **_: outputs, inputs, False)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def _of_one_rank(values: Tensor) -> Tensor:
    return values


def _compute_loss():
    package = importlib.util.find_spec("trl")
    if package is None or not package.submodule_search_locations:
        pytest.fail("trl is missing; this test's oracle needs: pip install --no-deps trl")
    path = Path(package.submodule_search_locations[0]) / "trainer" / "dpo_trainer.py"
    (trainer,) = (
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == "DPOTrainer"
    )
    (method,) = (node for node in trainer.body if isinstance(node, ast.FunctionDef) and node.name == "_compute_loss")
    names = {"torch": torch, "F": F, "math": math}
    exec(compile(ast.Module(body=[method], type_ignores=[]), str(path), "exec"), names)
    return names["_compute_loss"]
