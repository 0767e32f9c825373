"""Captioned pictures out of two Debian packages, as LLaVA JSON, with hallucinated twins by rules.

python examples/small_real/pictures.py --debian output/small_real/debian --output output/small_real/data

openclipart-png          a PNG's own title is its caption
tuxpaint-stamps-default  the first line of the text beside a picture is
wamerican                a word is a word if it stands in this list

OUTPUT/images           JPEGs
OUTPUT/train.json       to train on
OUTPUT/valid.json       held out, each with a twin
OUTPUT/valid_other.json the same captions and twins, but each with another's picture: what is right there is guessed
OUTPUT/ten.json         ten of the held-out pictures, as questions (in the form of MMHal-Bench)

Kept is what says in English words what one picture shows. A title that many pictures share names a collection, titles
in other languages and authors' notes have words that are none; all that is left out is counted. A twin that only adds
something (`An onion and a bicycle.`) is dropped, for it is told from the caption without a look at the picture. Held
out are whole captions, so that a drawing and a copy of the same title are never on both sides; one with a longer or
shorter title may be.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from tqdm import tqdm

CLIPART, STAMPS, WORDS = "usr/share/openclipart/png", "usr/share/tuxpaint/stamps", "usr/share/dict/american-english"
OF_A_COLLECTION = 12
"""Pictures that a title may have."""
LONGEST = 8
"""Words of a caption: longer ones tell stories."""
TWINS = Path(__file__).parents[2] / "tools" / "generate_hallucinations.py"
TWIN = "Hallucination caption"
SYMBOLS = (
    "signs_and_symbols",
    "symbols",
    "shapes",
    "special",
    "geography",
    "icons",
    "computer",
    "buttons",
    "logos",
    "roadsigns",
    "aiga-symbols",
)
"""Folders of letters, coins, flags, maps, arrows and icons: what they are called is not what they look like."""
SIDE = 224
"""Of the longer edge of what is written, in pixels."""
REQUEST = "What is this?"


def titled(root: Path) -> Iterator[tuple[Path, str]]:
    """Each picture, and what its own file or the text beside it says of it."""
    for path in sorted((root / CLIPART).rglob("*.png")):
        try:
            with Image.open(path) as picture:
                yield path, str(picture.info.get("Title", ""))
        except Image.DecompressionBombError:
            yield path, ""
    for path in sorted((root / STAMPS).rglob("*.png")):
        text = path.with_suffix(".txt")
        lines = text.read_text(encoding="utf-8", errors="replace").splitlines() if text.is_file() else []
        yield path, lines[0] if lines else ""


def cleaned(title: str) -> str:
    """`PointingHand2`, `pointing_hand (2)` and `A pointing hand!` as `pointing hand`."""
    title = re.sub(r"\(.*?\)|#|\d+", " ", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", title))
    words = re.sub(r"[_\-/.!?,]+", " ", title).lower().split()
    words = [word for word in words if word not in ("bw", "b&w", "clipart", "svg", "icon", "the")]
    return " ".join(words[1:] if words[:1] in (["a"], ["an"]) else words)


def sentence(words: str) -> str:
    """`An onion.`, `Two dice.`, `Holly leaves.`"""
    last, first = words.split()[-1], words.split()[0]
    plural = (last.endswith("s") and not last.endswith(("ss", "us"))) or first in ("two", "three", "some", "pair")
    article = "" if plural else "an " if words[0] in "aeiou" else "a "
    text = f"{article}{words}."
    return text[0].upper() + text[1:]


def captioned(root: Path) -> tuple[list[tuple[Path, str]], Counter[str]]:
    """(picture, caption) of what is kept, and how many were left out for which reason."""
    known = {word.strip().lower() for word in (root / WORDS).read_text(encoding="utf-8").splitlines()}
    known -= set("bcdefghjklmnopqrstuvwxyz")  # letters stand in the list too
    all_titles = [(path, cleaned(title)) for path, title in tqdm(titled(root), desc="titles", unit="picture")]
    shared = Counter(title for _, title in all_titles)
    kept, left_out = [], Counter()
    for path, title in all_titles:
        words = title.split()
        if not words:
            left_out["no title"] += 1
        elif any(part in SYMBOLS for part in path.parts):
            left_out["a symbol, a map, an icon"] += 1
        elif shared[title] > OF_A_COLLECTION:
            left_out["a collection's title"] += 1
        elif not all(word in known for word in words):
            left_out["words that are none"] += 1
        elif len(words) > LONGEST:
            left_out["too long"] += 1
        else:
            kept.append((path, sentence(title)))
    return kept, left_out


def write_picture(source: Path, target: Path) -> None:
    """A JPEG of at most `SIDE` pixels an edge; white shows where the picture is transparent."""
    with Image.open(source) as picture:
        picture = picture.convert("RGBA")
    picture.thumbnail((SIDE, SIDE))
    ground = Image.new("RGBA", picture.size, "white")
    Image.alpha_composite(ground, picture).convert("RGB").save(target, quality=90)


def add_twins(records: list[dict], folder: Path) -> list[dict]:
    """The records with hallucinated twins by rules, those that exchange words alone."""
    captions, twins = folder / "captions.json", folder / "twins.json"
    captions.write_text(json.dumps(records), encoding="utf-8")
    tool = [sys.executable, TWINS, "--method", "rules", "--input", captions, "--output", twins, "--force"]
    subprocess.run(tool, check=True, stdout=subprocess.DEVNULL)
    found = json.loads(twins.read_text(encoding="utf-8"))
    for record in found:
        record.pop("Hallucination edits", None)
        if record.get(TWIN, record["text"]).startswith(record["text"].rstrip(".")):
            record.pop(TWIN, None)
    for file in (captions, twins):
        file.unlink()
    return found


def write_splits(records: list[dict], output: Path, held_out: int, seed: int) -> tuple[int, int, int]:
    """The files at the head of this one; returns how many records each of train and valid has, and those left out."""
    captions = sorted({record["text"] for record in records if TWIN in record})
    random.Random(seed).shuffle(captions)
    kept_back = set(captions[:held_out])
    train = [record for record in records if record["text"] not in kept_back]
    valid = [record for record in records if record["text"] in kept_back and TWIN in record]
    random.Random(seed).shuffle(valid)
    pictures = [record["image"] for record in valid]
    other = [{**record, "image": image} for record, image in zip(valid, pictures[1:] + pictures[:1], strict=True)]
    first_of = {record["text"]: record for record in reversed(valid)}  # no caption twice
    ten = [
        {"image_src": record["image"], "question": REQUEST, "gt_answer": record["text"]}
        for record in list(first_of.values())[:10]
    ]
    for name, found in (("train", train), ("valid", valid), ("valid_other", other), ("ten", ten)):
        (output / f"{name}.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    return len(train), len(valid), len(records) - len(train) - len(valid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debian", type=Path, required=True, help="where `dpkg -x` laid the packages")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--held-out", type=int, default=64, help="captions in valid.json (default: 64)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if missing := [name for name in (CLIPART, STAMPS, WORDS) if not (args.debian / name).exists()]:
        parser.error(f"--debian {args.debian} lacks {', '.join(missing)}; lay the three packages there, as run.sh does")
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # some of these are wall-sized, and known
    kept, left_out = captioned(args.debian)

    (args.output / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for number, (path, caption) in enumerate(tqdm(kept, desc="pictures", unit="picture")):
        name = f"{number:05d}.jpg"
        write_picture(path, args.output / "images" / name)
        turns = [{"from": "human", "value": f"<image>\n{REQUEST}"}, {"from": "gpt", "value": caption}]
        records.append({"id": f"{number}", "image": name, "text": caption, "conversations": turns})
    records = add_twins(records, args.output)
    train, valid, copies = write_splits(records, args.output, args.held_out, args.seed)
    print(
        f"{train} pictures to train on, {valid} held out; {sum(TWIN in record for record in records)} have a twin. "
        f"Left out: {', '.join(f'{number} ({reason})' for reason, number in left_out.most_common())}, "
        f"{copies} (a held-out caption without a twin)"
    )


if __name__ == "__main__":
    main()
