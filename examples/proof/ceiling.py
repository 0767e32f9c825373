"""What the frozen language models say of scenes told without error: no connector can do better in stage 1.

    python examples/proof/ceiling.py --data output/proof/data --parts output/proof/parts

It gets the notes of what every patch shows in the image's place, in stage 2's template.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from draw_world import read_scene, read_scenes
from language import embed_notes
from make_parts import SYSTEM, new_library
from run_arms import languages_in
from score_run import LONGEST, score_answers
from transformers import AutoTokenizer, LlamaForCausalLM
from world import DETAILED


@torch.no_grad()
def answers_to(
    model: LlamaForCausalLM, front: torch.Tensor, notes: torch.Tensor, asked: Sequence[list[int]], length: int, pad: int
) -> list[list[int]]:
    """Greedy answers, one row at a time.

    Args:
        front: [F, H] embeddings before the notes.
        notes: [N, P, H] embeddings of the notes.
        asked: N questions as token ids.
    """
    answers = []
    for place, ids in zip(notes, asked, strict=True):
        row = torch.cat([front, place, model.model.embed_tokens(torch.tensor(ids))])[None]
        seen = torch.ones(row.shape[:2], dtype=torch.long)
        settings = {"max_new_tokens": length, "do_sample": False, "eos_token_id": 2, "pad_token_id": pad}
        answers.append(model.generate(inputs_embeds=row, attention_mask=seen, **settings)[0].tolist())
    return answers


@torch.no_grad()
def ceiling_of(language: Path, data: Path, split: str, limit: int) -> dict[str, float]:
    """Scores of one language model on the first `limit` scenes of a split."""
    tokenizer = AutoTokenizer.from_pretrained(language)
    model = LlamaForCausalLM.from_pretrained(language).eval()
    embed = model.model.embed_tokens
    library = new_library(data, tokenizer, seed=0, split=split)
    notes = embed_notes(embed, library.notes[:limit])
    front = embed(torch.tensor([1, *library.ids(SYSTEM + "USER: ")]))
    names = list(read_scenes(data, split))[:limit]
    assert [read_scene(read_scenes(data, split)[name]) for name in names[:3]] == list(library.scenes[:3])

    def say(questions: Sequence[str], at: Sequence[int], length: int) -> list[str]:
        asked = [library.ids(f"\n{question} ASSISTANT:") for question in questions]
        said = answers_to(model, front, notes[list(at)], asked, length, tokenizer.pad_token_id)
        return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in said]

    described = say([DETAILED] * len(names), range(len(names)), LONGEST)
    lines = [line for line in json.loads((data / f"{split}.questions.json").read_text()) if line["image"] in names]
    said = say([line["text"] for line in lines], [names.index(line["image"]) for line in lines], 3)
    answered = [line | {"answer": answer} for line, answer in zip(lines, said, strict=True)]
    return score_answers({"descriptions": dict(zip(names, described, strict=True)), "yes/no": answered}, data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("output/proof/data"))
    parser.add_argument("--parts", type=Path, default=Path("output/proof/parts"))
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--limit", type=int, default=100, help="scenes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for language in languages_in(args.parts):
        scores = ceiling_of(args.parts / language, args.data, args.split, args.limit)
        print(f"{language}, told without error: " + ", ".join(f"{name} {value:.3f}" for name, value in scores.items()))


if __name__ == "__main__":
    main()
