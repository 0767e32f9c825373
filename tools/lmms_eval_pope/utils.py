"""Functions of pope_local.yaml, for lmms-eval. They need nothing but Pillow and the environment variable POPE_IMAGES.

Answers are read as POPE's own evaluate.py reads them. lmms-eval's task `pope` counts nothing but "yes" and "no" alone:
for it "Yes." is neither.
"""

import os
from pathlib import Path

from PIL import Image


def doc_to_visual(doc):
    """The question's image, from the folder POPE_IMAGES."""
    with Image.open(Path(os.environ["POPE_IMAGES"]) / doc["image"]) as image:
        return [image.convert("RGB")]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    """The question, between what the task puts around it."""
    around = lmms_eval_specific_kwargs or {}
    return f"{around.get('pre_prompt', '')}{doc['text'].strip()}{around.get('post_prompt', '')}"


def says_yes(answer):
    """POPE's reading: the first sentence, without commas, means no if it has No, no or not, else yes."""
    return not {"No", "not", "no"} & set(answer.strip().split(".")[0].replace(",", "").split(" "))


def process_results(doc, results):
    """(whether the label is yes, whether the answer says yes), under the name of each metric."""
    one = (doc["label"] == "yes", says_yes(results[0]))
    return dict.fromkeys(("accuracy", "precision", "recall", "f1", "yes_ratio"), one)


def accuracy(results):
    """Share of answers that are right."""
    return _share(label == answer for label, answer in results)


def precision(results):
    """Share of right ones among the answers yes."""
    return _share(label for label, answer in results if answer)


def recall(results):
    """Share of answers yes where yes is right."""
    return _share(answer for label, answer in results if label)


def f1(results):
    """Harmonic mean of precision and recall."""
    both = precision(results) + recall(results)
    return 2 * precision(results) * recall(results) / both if both else 0.0


def yes_ratio(results):
    """Share of answers yes."""
    return _share(answer for _, answer in results)


def _share(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0
