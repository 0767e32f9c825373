"""Ranks that were started otherwise than rank 0: all leave with one line, before a step or a collective that hangs."""

import contextlib
import io
import json
import os
import re
import time
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from hacl_megatron.assemble import same_run
from hacl_megatron.train import main
from tests.distributed import run_distributed
from tests.training.runs import layout_flags, make_inputs, metrics

DIFFERENCES = {
    "rate": (["--lr", "1e-30"], ["--lr is 1e-30 there and 0.001 here"]),
    "seed": (["--seed", "7"], ["--seed is 7 there and 1234 here"]),
    "frozen": (["--freeze-LM", "false"], ["--freeze-LM is false there and true here"]),
    "layout": (["--tensor-model-parallel-size", "2"], ["--tensor-model-parallel-size is 2 there and 1 here"]),
    "other folder to save to": (["--save", "elsewhere"], ["--save is elsewhere there and "]),
    "no validation": (["--valid-data-path", "{few}"], ["number of --valid-data-path is 1 there and 0 here"]),
    "section": (["--config", "{section}"], ["transformer.hidden_dropout is 0.25 there and absent here"]),
    "fewer samples": (["--data-path", "{few}"], ["content of --data-path is "]),
    "one letter": (["--data-path", "{letter}"], ["content of --data-path is "]),
    "source": ([], ["source hacl_megatron/training/step.py is "]),
    "library": ([], ["version of torch is 9.9 there and "]),
    "variable": ([], ["environment variable NVTE_FLASH_ATTN is 0 there and absent here"]),
}
"""What rank 1 alone is given or has, and what is said of it."""
BY_RIGHT = ["--num-workers", "2", "--data-path", "{copy}", "--image-folder", "{images}", "--tensorboard-dir", "{other}"]
"""Files that lie elsewhere on another node, and speed, are its own affair."""


def differing(folder: str, names: dict[str, list[str]]) -> list[tuple[int | None, str, float]]:
    """Exit code, stderr and seconds of this rank's `main` in each case."""
    rank, found = dist.get_rank(), []
    common = ["--config", f"{folder}/pretrain.yaml", *layout_flags("dp2")[1], "--train-iters", "1"]
    for name, extra in names.items():
        arguments = [*common, "--save", f"{folder}/{name}", *(extra if rank == 1 else [])]
        if rank == 1 and name == "section":
            arguments = [*extra, *common[2:], "--save", f"{folder}/{name}"]
        with contextlib.ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            if rank == 1 and name == "source":
                source = same_run._source()
                changed = source | {"source hacl_megatron/training/step.py": "ab"}
                patch.setattr(same_run, "_source", partial(dict, changed))
            if rank == 1 and name == "library":
                patch.setattr(same_run.importlib.metadata, "version", lambda library: "9.9")
            patch.delenv("NVTE_FLASH_ATTN", raising=False)  # a run before in this process has set it
            if rank == 1 and name == "variable":
                patch.setenv("NVTE_FLASH_ATTN", "0")
            said, code = stack.enter_context(contextlib.redirect_stderr(io.StringIO())), None
            started = time.monotonic()
            try:
                main(arguments)
            except SystemExit as leaving:
                code = leaving.code
            found.append((code, said.getvalue(), time.monotonic() - started))
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[tuple[int | None, str, float]]]]:
    folder = make_inputs(tmp_path_factory.mktemp("differing"))
    data = json.loads((folder / "data" / "pretrain.json").read_text())
    places = {name: str(folder / f"{name}.json") for name in ("few", "letter", "copy")}
    places |= {"section": str(folder / "section.yaml"), "other": str(folder / "other"), "images": str(folder / "moved")}
    Path(places["few"]).write_text(json.dumps(data[:-1]))
    Path(places["copy"]).write_text(json.dumps(data))
    (folder / "moved").symlink_to(next(folder.glob("data/*images*"), folder / "data"))
    data[-1]["conversations"][-1]["value"] += "s"
    Path(places["letter"]).write_text(json.dumps(data))
    Path(places["section"]).write_text(
        (folder / "pretrain.yaml").read_text() + "transformer:\n  hidden_dropout: 0.25\n"
    )
    flags = {name: extra for name, (extra, _) in DIFFERENCES.items()} | {"by right": BY_RIGHT}
    flags = {name: [word.format(**places) for word in extra] for name, extra in flags.items()}
    found = run_distributed(differing, 2, str(folder), flags)
    return folder, {name: [ranks[number] for ranks in found] for number, name in enumerate(flags)}


@pytest.mark.parametrize("name", list(DIFFERENCES))
def test_a_rank_that_differs_ends_the_run_in_one_line_that_names_it(runs, name: str) -> None:
    """Catches training on with two rates, two seeds or two sets of samples, and a collective that hangs or aborts."""
    folder, found = runs
    assert [code for code, _, _ in found[name]] == [2, 2], found[name]
    said = "".join(text for _, text, _ in found[name])
    lines = [line for line in said.splitlines() if line.startswith("hacl_megatron: error: ")]
    assert len(lines) == 1 and "Traceback" not in said, said
    assert all(words in lines[0] for words in DIFFERENCES[name][1]), lines[0]
    assert re.search(r"from rank 0 on \S+ here to rank 1 on \S+ there", lines[0]), lines[0]
    assert not (folder / name / "iter_0000001").exists() and not (folder / name / "metrics.jsonl").exists()
    assert max(seconds for _, _, seconds in found[name]) < 60


def test_what_differs_between_nodes_by_right_trains(runs) -> None:
    """Catches a comparison of paths instead of contents."""
    folder, found = runs
    assert [code for code, _, _ in found["by right"]] == [None, None], found["by right"]
    assert len(metrics(folder / "by right")) == 1


def test_facts_cost_a_start_nothing(runs) -> None:
    """A tenth of a second on every rank; a rank moves 50 bytes where all agree (`agreement`)."""
    folder, _ = runs
    from hacl_megatron.config.run import parse_run_config

    config = parse_run_config(["--config", f"{folder}/pretrain.yaml", *layout_flags("tp1")[1]])
    started = time.perf_counter()
    facts = same_run.facts_of(config)
    assert time.perf_counter() - started < 2.0
    assert len(facts) > 200 and f"source hacl_megatron{os.sep}train.py" in facts
