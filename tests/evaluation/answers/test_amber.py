"""AMBER's metrics against what AMBER's own script prints."""

import json
import re
from collections.abc import Set
from pathlib import Path

import pytest

from hacl_megatron.evaluation.answers.amber import WordLists, read_annotations, score_amber
from hacl_megatron.evaluation.answers.amber_nouns import LexiconNouns, SpacyNouns
from hacl_megatron.evaluation.json_files import read_json
from tests.tool_runs import run_tool

DATA = Path(__file__).parent / "data/amber"
ANNOTATIONS = DATA / "annotations.json"


def printed(task: str) -> list[float]:
    return [float(value) for value in re.findall(r":\s+([\d.]+)", (DATA / f"official_{task}.txt").read_text())]


def word_lists() -> WordLists:
    return WordLists.read(DATA / "relation.json", DATA / "safe_words.txt")


class TabledNouns:
    """Words as they stand, near synonyms from a table: what official_generative.txt was printed with."""

    notes = ()

    def __init__(self) -> None:
        self.pairs = {frozenset(pair) for pair in read_json(DATA / "near_synonyms.json")}

    def nouns(self, text: str, known: Set[str]) -> list[str]:
        return text.split()

    def similar(self, first: str, second: str) -> bool:
        return first == second or frozenset((first, second)) in self.pairs


def test_questions_score_as_published() -> None:
    scores = score_amber(read_annotations(ANNOTATIONS), read_json(DATA / "answers_discriminative.json"))
    assert list(scores.metrics.values()) == printed("discriminative")
    assert len(scores.metrics) == 28
    assert scores.counts["relation questions"] == 80 and scores.counts["attribute questions"] == 120
    assert scores.notes == ("6 responses are neither 'Yes' nor 'No': AMBER counts them as wrong",)


def test_descriptions_score_as_published() -> None:
    answers = read_json(DATA / "answers_generative.json")
    scores = score_amber(read_annotations(ANNOTATIONS), answers, words=word_lists(), nouns=TabledNouns())
    assert list(scores.metrics.items()) == list(
        zip(("CHAIR", "Cover", "Hal", "Cog"), printed("generative"), strict=True)
    )


def test_only_dimensions_that_were_answered_are_reported() -> None:
    annotations = {3: {"id": 3, "type": "discriminative-attribute-state", "truth": "no"}}
    scores = score_amber(annotations, [{"id": 3, "response": "No"}])
    assert {name.split()[0] for name in scores.metrics} == {"discriminative", "attribute", "state"}


def test_the_lexicon_finds_the_nouns_of_a_description() -> None:
    nouns, known = LexiconNouns(), word_lists().known
    text = "Two dogs lie on the grass. A woman sits beside children near the leaves of a tree; mountains rise."
    assert [noun for noun in nouns.nouns(text, known) if noun in known] == [
        "dog", "grass", "woman", "child", "tree", "mountain",
    ]  # fmt: skip
    assert "approximation" in nouns.notes[0]


def test_the_command_names_the_approximation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = tmp_path / "answers.json"
    truth = read_annotations(ANNOTATIONS)
    described = [annotation for annotation in truth.values() if annotation["type"] == "generative"][:5]
    answers.write_text(
        json.dumps([{"id": a["id"], "response": f"I see {' and '.join(a['truth'])}."} for a in described])
    )
    arguments = ("--task", "amber", "--annotations", ANNOTATIONS, "--answers", answers, "--output", tmp_path / "r.json")
    assert run_tool("evaluate", *arguments) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["settings"]["amber_nouns"] == "lexicon" and "approximation" in result["notes"][0]
    assert "approximation" in capsys.readouterr().out
    # Descriptions of nothing but what is there: nothing is hallucinated, and most of it is covered.
    assert result["metrics"]["CHAIR"] == 0.0 and result["metrics"]["Hal"] == 0.0 and result["metrics"]["Cover"] > 75


def test_amber_nouns_spacy_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"--amber-nouns spacy needs .* (python -m spacy download|nltk.downloader)"):
        SpacyNouns("no_such_model")


def test_answers_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    annotations = read_annotations(ANNOTATIONS)
    with pytest.raises(ValueError, match="id 99999 has no annotation"):
        score_amber(annotations, [{"id": 99999, "response": "Yes"}])
    id = read_json(DATA / "answers_discriminative.json")[0]["id"]
    with pytest.raises(ValueError, match=f"a second answer to id {id}"):
        score_amber(annotations, [{"id": id, "response": "Yes"}] * 2)
    with pytest.raises(ValueError, match="safe words cannot be read"):
        WordLists.read(DATA / "relation.json", tmp_path / "safe_words.txt")
    path = tmp_path / "annotations.json"
    path.write_text('[{"id": 1, "type": "odd", "truth": "yes"}]')
    with pytest.raises(ValueError, match="type 'odd'"):
        read_annotations(path)
