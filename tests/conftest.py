"""Options of the test command."""

from pathlib import Path

import pytest

QUICK = (
    "tests/config/",
    "tests/objective/",
    "tests/platform/",
    "tests/data/prepare/test_llava_json.py",
    "tests/data/order/test_assignment.py",
    "tests/data/test_encoding.py",
    "tests/data/test_loader.py",
    "tests/data/test_manifest.py",
    "tests/data/order/test_mixing.py",
    "tests/data/test_packing.py",
    "tests/data/order/test_sampler.py",
    "tests/data/test_store.py",
    "tests/data/test_tokenizer.py",
    "tests/hallucinate/test_rules.py",
    "tests/checkpoint/hf/test_config.py",
    "tests/checkpoint/hf/test_shards_compute.py",
    "tests/checkpoint/hf/test_round_trip.py::test_hf_layout_round_trip_is_bitwise[odd",
    "tests/checkpoint/run/",
    "tests/model/test_connector.py",
    "tests/model/test_parity.py::test_logits_and_embeddings_are_those_of_transformers[plain, TP1 PP1]",
    "tests/model/test_parity.py::test_logits_and_embeddings_are_those_of_transformers[plain, TP2+SP PP1]",
    "tests/model/test_parity.py::test_gradients_are_those_of_transformers[plain, TP1 PP1]",
    "tests/model/test_parity.py::test_gradients_are_those_of_transformers[plain, TP2+SP PP1]",
    "tests/training/test_reference.py",
    "tests/training/test_gradient_invariance.py::test_losses_and_gradients_are_those_of_one_process_and_one_micro_batch"
    "[dp2-finetune]",
    "tests/training/test_faults.py::test_a_step_that_overflows_on_one_rank_is_skipped_on_all[tp1",
    "tests/training/test_precision.py::test_weight_decay_spares_biases_vectors_and_the_temperature",
    "tests/training/test_precision.py::test_rates_follow_the_schedule",
    "tests/training/test_precision.py::test_temperature_is_kept_in_its_bounds_after_the_step_in_fp32",
    "tests/training/test_resume.py::test_resumed_at_its_own_layout_is_bitwise_the_uninterrupted_run[dp2-dist",
    "tests/evaluation/answers/test_amber.py",
    "tests/evaluation/answers/test_answerer.py",
    "tests/evaluation/answers/test_chair.py",
    "tests/evaluation/answers/test_pope.py",
    "tests/evaluation/likelihood/test_representations.py",
    "tests/evaluation/likelihood/test_retrieval.py",
    "tests/examples/test_readmes.py",
    "tests/test_house.py",
)
"""What `--quick` runs: folders, files, and beginnings of tests' names; of what several processes do, one case each."""
ROOT = Path(__file__).parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hacl_megatron")
    group.addoption("--slurm", action="store_true", help="also run tests/slurm: jobs on a real Slurm on this host")
    group.addoption("--full", action="store_true", help="with --slurm: its long forms too")
    group.addoption(
        "--quick", action="store_true", help="of the tests asked for, only those in tests/conftest.py's QUICK"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--quick") and (gone := [name for name in QUICK if not (ROOT / name.split("::")[0]).exists()]):
        raise pytest.UsageError(f"tests/conftest.py: QUICK names {', '.join(gone)}: no such file")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files of which no test is quick are not even imported."""
    if not config.getoption("--quick") or collection_path.is_dir():
        return None
    name = collection_path.relative_to(ROOT).as_posix()
    return None if any(name.startswith(quick.split("::")[0]) for quick in QUICK) else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--quick"):
        return
    kept = [item for item in items if item.nodeid.startswith(QUICK)]
    names = {item.nodeid.split("::")[0] for item in items}
    stale = [
        quick for quick in QUICK if quick.split("::")[0] in names and not any(i.nodeid.startswith(quick) for i in kept)
    ]
    if stale and not any("::" in argument for argument in config.args):
        raise pytest.UsageError(f"tests/conftest.py: QUICK names {', '.join(stale)}: no such test")
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
