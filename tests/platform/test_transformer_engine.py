"""Models of Transformer Engine's modules against transformers' LLaVA and peft, and their checkpoints against ours.

Runs where `transformer_engine` imports (its core and its torch extension); no GPU is needed, see `te_on_host`.
"""

import contextlib
import io
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed.checkpoint import FileSystemReader, load

from hacl_megatron.train import run
from tests.distributed import run_distributed
from tests.model import lora_cases, parity_cases
from tests.model.lora_cases import FULL_RECOMPUTE
from tests.model.parity_cases import Layout
from tests.model.test_parity import EMBEDDINGS, GRADIENTS, LOGITS
from tests.platform.te_on_host import te_on_host
from tests.training.runs import LOSSES, latest_checkpoint, layout_flags, make_inputs, metrics, train, weights

pytest.importorskip("transformer_engine.pytorch", exc_type=ImportError)

ONE, TP2, TP2_SP, PP2 = Layout(), Layout(tp=2), Layout(tp=2, sp=True), Layout(pp=2, first=1)
VARIANTS = {"plain": parity_cases.Variant(), "vision": parity_cases.Variant({"select_layer": -1}, trains_vision=True)}
CASES = [*(("plain", layout) for layout in (ONE, TP2, TP2_SP, PP2)), ("vision", ONE), ("vision", TP2_SP)]
LORA_CASES = [
    lora_cases.Case("all", ONE), lora_cases.Case("all", ONE, FULL_RECOMPUTE), lora_cases.Case("all", TP2),
    lora_cases.Case("all", TP2_SP), lora_cases.Case("all", TP2_SP, FULL_RECOMPUTE), lora_cases.Case("all", PP2),
]  # fmt: skip


NAMED = {f"{name}, {layout}": layout for name, layout in CASES} | {f"lora {case}": case.layout for case in LORA_CASES}


def with_engine(function: Callable, *arguments: Any) -> Any:
    """`function(*arguments)` of a rank, with models of Transformer Engine's modules."""
    with te_on_host():
        return function(*arguments)


def as_it_is(function: Callable, *arguments: Any) -> Any:
    return function(*arguments)


def on_ranks(
    function: Callable, jobs: Sequence[tuple], layouts: Sequence[Layout], side: Callable = with_engine
) -> list[list[Any]]:
    """What each rank found in every job, on one group of processes for each number of ranks."""
    found: dict[int, list[Any]] = {}
    for size in sorted({layout.world_size for layout in layouts}):
        indices = [index for index, layout in enumerate(layouts) if layout.world_size == size]
        ranks = run_distributed(side, size, function, [jobs[index] for index in indices])
        found |= {index: [rank[place] for rank in ranks] for place, index in enumerate(indices)}
    return [found[index] for index in range(len(jobs))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What transformers and peft say."""
    found = {name: tmp_path_factory.mktemp(name) for name in (*VARIANTS, "lora")}
    for name, variant in VARIANTS.items():
        parity_cases.write_reference(found[name], variant)
    lora_cases.write_reference(found["lora"], lora_cases.Variant())
    return found


@pytest.fixture(scope="module")
def compared(folders) -> dict[Any, list[dict[str, Any]]]:
    """What every rank of every case found."""
    full = on_ranks(parity_cases.compare_all, [(str(folders[name]), layout) for name, layout in CASES],
                    [layout for _, layout in CASES])  # fmt: skip
    lora = on_ranks(lora_cases.compare_all, [(str(folders["lora"]), case, lora_cases.Variant()) for case in LORA_CASES],
                    [case.layout for case in LORA_CASES])  # fmt: skip
    return dict(zip(NAMED, [*full, *lora], strict=True))


@pytest.mark.parametrize("case", NAMED)
def test_outputs_and_gradients_are_those_of_transformers_and_peft(compared, case: str) -> None:
    """Fused and separate norms, the last layer, attention, CLIP's layers with their biases."""
    outputs = [found["outputs"] for found in compared[case] if found["outputs"]]
    assert len(outputs) == NAMED[case].tp, "every tensor-parallel rank of the last stage has outputs"
    for name, difference in (item for found in outputs for item in found.items()):
        assert difference <= (LOGITS if name.startswith("logits") else EMBEDDINGS), (name, difference)
    for found in compared[case]:
        worst = max(found["gradients"], key=found["gradients"].get)
        assert found["gradients"][worst] <= GRADIENTS, (worst, found["gradients"][worst])
        assert not found.get("zero in transformers") and not found.get("others in training")


# ---------------------------------------------------------------------------------------------------------- checkpoints


def describe(jobs: list[tuple[str, Layout, bool]]) -> list[tuple[dict[tuple, tuple], Counter]]:
    """Of each (folder, layout, with adapters) model: place and shape of this rank's weights, and the classes built."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    from hacl_megatron.platform.processes import start_platform

    device, found = start_platform("cpu"), []
    for folder, layout, adapted in jobs:
        weights = Path(folder) / "weights"
        if adapted:
            module = lora_cases.build(weights, lora_cases.Case("all", layout), lora_cases.Variant(), device)[0]
        else:
            module = parity_cases.build(weights, layout, device)[0]
        parts = list(nested_values(module.sharded_state_dict(metadata={})))
        pieces = [p for part in parts if isinstance(part, ShardedTensorFactory) for p in nested_values(part.build())]
        pieces += [part for part in parts if isinstance(part, ShardedTensor)]
        places = {(p.key, p.global_offset): (p.global_shape, p.local_shape, p.dtype, p.replica_id) for p in pieces}
        found.append((places, Counter(type(part).__name__ for part in module.modules())))
    return found


@pytest.fixture(scope="module")
def described(folders) -> dict[str, list[list[tuple[dict[tuple, tuple], Counter]]]]:
    """What each rank has of every job, of local layers and of Transformer Engine's."""
    jobs = [(str(folders["lora"]), layout, adapted) for layout in (ONE, TP2_SP, PP2) for adapted in (False, True)]
    layouts = [layout for _, layout, _ in jobs]
    return {"local": on_ranks(describe, jobs, layouts, as_it_is), "engine": on_ranks(describe, jobs, layouts)}


def test_weights_have_the_same_names_and_places_in_checkpoints(described) -> None:
    """A norm that is fused into the linear layer behind it, and one that stands alone before it, are one tensor."""
    assert len(described["engine"]) == 6
    for local, engine in zip(described["local"], described["engine"], strict=True):
        for (expected, _), (found, _) in zip(local, engine, strict=True):
            assert found == expected and len(found) > 20


def test_every_layer_and_norm_is_transformer_engines(described) -> None:
    """At one process: only the LM head is megatron-core's own."""
    (_, plain), (_, adapted) = described["engine"][0][0], described["engine"][1][0]
    (_, local) = described["local"][0][0]
    layers, towers = parity_cases.LAYERS, local["TransformerLayer"] - parity_cases.LAYERS + 1
    assert local["RMSNorm"] == 2 * layers + 1 and local["LayerNorm"] == 2 * towers + 1
    assert plain["TELayerNormColumnParallelLinear"] == 2 * (layers + towers)
    assert plain["TERowParallelLinear"] == adapted["TERowParallelLinear"] == 2 * (layers + towers)
    assert adapted["TELayerNormColumnParallelLinear"] == 2 * towers and adapted["TEColumnParallelLinear"] == 2 * layers
    assert (plain["RMSNorm"], plain["LayerNorm"]) == (1, 1) and adapted["RMSNorm"] == 2 * layers + 1
    for counted in (plain, adapted):
        assert counted["ColumnParallelLinear"] == 1 and counted["RowParallelLinear"] == 0
        assert counted["PackedAttention"] == layers + towers and counted["LastLayer"] == 1


# ---------------------------------------------------------------------------------------------------------------- runs

KINDS = {"all": ("tp2-sp-dist", ["--freeze-ViT", "false"]), "lora": ("tp1", ["--lora-rank", "4", "--lr", "1e-2"])}
SIDES = {"local": run, "engine": partial(with_engine, run)}
CHANGES = [(before, after) for before in SIDES for after in SIDES if (before, after) != ("local", "local")]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("engine_runs"), samples=24)


@pytest.fixture(scope="module")
def finished(inputs: Path) -> Path:
    """Whole runs of local layers; for each side one that stops half-way, and what goes on from it on either side."""
    folder = inputs
    for kind, (layout, flags) in KINDS.items():
        size, layout_of_kind = layout_flags(layout)
        common = ["--config", str(folder / "finetune.yaml"), *layout_of_kind, *flags]

        def one(side: str, name: str, *more: str, common: list[str] = common) -> Callable[[], None]:
            return partial(SIDES[side], [*common, "--save", str(folder / name), *more])

        commands = [one("local", f"{kind}-whole")]
        commands += [one(side, f"{kind}-{side}", "--exit-interval", "2") for side in SIDES]
        commands += [
            one(after, f"{kind}-{before}-{after}", "--load", str(folder / f"{kind}-{before}"))
            for before, after in CHANGES
        ]
        train(commands, size)
    return folder


def run_and_print(side: str, command: list[str], printed: Path) -> None:
    with printed.open("w") as file, contextlib.redirect_stdout(file):
        SIDES[side](command)


@pytest.fixture(scope="module")
def finished_fp8(inputs: Path) -> Path:
    """Runs with FP8's delayed scaling: whole, interrupted and resumed; and changes to and from runs without."""
    stage = yaml.safe_load((inputs / "finetune.yaml").read_text())
    (inputs / "fp8.yaml").write_text(yaml.safe_dump({**stage, "transformer": {"fp8": "hybrid"}}))
    commands = []
    for name, stage, side, more in (
        ("fp8-whole", "fp8", "engine", []),
        ("fp8-half", "fp8", "engine", ["--exit-interval", "2"]),
        ("fp8-resumed", "fp8", "engine", ["--load", str(inputs / "fp8-half")]),
        ("plain-half", "finetune", "engine", ["--exit-interval", "2"]),
        ("fp8-from-plain", "fp8", "engine", ["--load", str(inputs / "plain-half")]),
        ("plain-from-fp8", "finetune", "engine", ["--load", str(inputs / "fp8-half")]),
        ("local-from-fp8", "finetune", "local", ["--load", str(inputs / "fp8-half")]),
    ):
        command = ["--config", str(inputs / f"{stage}.yaml"), *layout_flags("tp1")[1], "--train-iters", "4"]
        command += ["--save", str(inputs / name), *more]
        commands.append(partial(run_and_print, side, command, inputs / f"{name}.txt"))
    train(commands, 1)
    return inputs


def scales(save: Path) -> list[torch.Tensor]:
    """The scales of every layer's products with its weights, in the newest checkpoint."""
    reader = FileSystemReader(latest_checkpoint(save))
    names = [name for name in reader.read_metadata().state_dict_metadata if "._extra_state/" in name]
    found: dict[str, Any] = {
        name: io.BytesIO() for name in names if "language_model.decoder" in name and "linear" in name
    }
    load(found, storage_reader=reader, no_dist=True)
    states = [found[name][0] for name in sorted(found)]
    return [pickle.loads(state.numpy().tobytes())["scale_fwd"] for state in states if state is not None and len(state)]


def test_fp8_scales_go_on_where_they_were(finished_fp8) -> None:
    """Transformer Engine 2.20 and later refuse to load what they pickled, unless they are told that it is trusted."""
    whole, half, resumed = (scales(finished_fp8 / name) for name in ("fp8-whole", "fp8-half", "fp8-resumed"))
    assert len(whole) == len(half) == len(resumed) == 4 * 4, "four linear layers in each of four LLaMA layers"
    assert [float(scale[0]) for scale in half] == [3.0] * 16 and [float(scale[0]) for scale in whole] == [5.0] * 16
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    assert "FP8" not in (finished_fp8 / "fp8-resumed.txt").read_text()


def test_fp8_scales_that_are_not_there_or_of_no_use_are_said(finished_fp8) -> None:
    assert "delayed scaling starts with fresh ones" in (finished_fp8 / "fp8-from-plain.txt").read_text()
    assert [float(scale[0]) for scale in scales(finished_fp8 / "fp8-from-plain")] == [3.0] * 16
    for name in ("plain-from-fp8", "local-from-fp8"):
        assert "FP8 scales are left out" in (finished_fp8 / f"{name}.txt").read_text()
        assert scales(finished_fp8 / name) == []


@pytest.mark.parametrize(("before", "after"), CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_whichever_layers_saved_it(finished, kind, before, after) -> None:
    whole, found = metrics(finished / f"{kind}-whole")[2:], metrics(finished / f"{kind}-{before}-{after}")
    assert [row["iteration"] for row in found] == [3, 4, 5]
    for expected, row in zip(whole, found, strict=True):
        for tag in (*LOSSES, "temperature", "grad-norm"):
            assert row[tag] == pytest.approx(expected[tag], rel=1e-4, abs=1e-6), (row["iteration"], tag)
    assert weights(finished / f"{kind}-whole").keys() == weights(finished / f"{kind}-{before}-{after}").keys()
