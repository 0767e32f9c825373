"""The task that lmms-eval is given: its functions by themselves, since lmms-eval is not among the test's packages."""

import random
import runpy
from pathlib import Path

import pytest
import yaml
from PIL import Image

from hacl_megatron.evaluation.answers.pope import score_pope
from tests.tool_runs import TOOLS

FOLDER = TOOLS / "lmms_eval_pope"
ANSWERS = ("Yes.", "yes", "No.", "no", "No, there is none.", "NO", "Not here", "It is not.", "", "Yes, no doubt", " No")


@pytest.fixture(scope="module")
def functions() -> dict:
    return runpy.run_path(str(FOLDER / "utils.py"))


@pytest.mark.parametrize("seed", range(3))
def test_it_scores_as_evaluate_does(functions: dict, seed: int) -> None:
    """Catches an answer that is read otherwise than by POPE's rule, and precision and recall that are exchanged."""
    rng = random.Random(seed)
    questions = [{"text": f"Is there {n}?", "label": rng.choice(("yes", "no"))} for n in range(200)]
    answers = [rng.choice(ANSWERS) for _ in questions]
    # The trainer's own answers come without blanks around them.
    ours = score_pope(questions, [{"answer": answer.strip()} for answer in answers]).metrics
    found = [functions["process_results"](*one) for one in zip(questions, [[one] for one in answers], strict=True)]
    for metric in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
        assert functions[metric]([result[metric] for result in found]) == pytest.approx(ours[metric.replace("_", " ")])


def test_the_task_names_what_is_there_and_downloads_nothing(functions: dict, tmp_path: Path, monkeypatch) -> None:
    """Catches a metric without a function, and a data set of the hub."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: functions[node.value.removeprefix("utils.")])
    task = yaml.load((FOLDER / "pope_local.yaml").read_text(), Loader)
    assert (task["dataset_path"], task["dataset_kwargs"]) == ("json", {"data_files": {"test": "pope.jsonl"}})
    doc = {"image": "a.png", "text": " Is it? ", "label": "yes"}
    assert {metric["metric"] for metric in task["metric_list"]} == set(task["process_results"](doc, ["Yes"]))
    assert all(metric["aggregation"]([(True, True)]) == 1.0 for metric in task["metric_list"])
    assert task["doc_to_text"](doc, task["lmms_eval_specific_kwargs"]["default"]) == (
        "Is it?\nAnswer the question using a single word or phrase."
    )
    Image.new("LA", (3, 2)).save(tmp_path / "a.png")
    monkeypatch.setenv("POPE_IMAGES", str(tmp_path))
    (image,) = task["doc_to_visual"](doc)
    assert (image.mode, image.size) == ("RGB", (3, 2))
