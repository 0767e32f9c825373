"""The input benchmark on a handful of images: both ways run, and make the same pixels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
BOTH = """
import sys
from benchmark_data import main, parse
words = sys.argv
for tiles in ("none", "llava_next", "llava_onevision"):
    sys.argv = [*words, "--tiles", tiles, "--save", f"{tiles}.json"]
    main(parse())
"""


@pytest.mark.timeout(300)
def test_both_ways_run_and_make_the_same_pixels(tmp_path):
    """Of single views and of tiles: in one process, which pays for its imports once."""
    sizes = ["--drawn-images", "12", "--micro-batch-size", "2", "--steps", "1", "--repetitions", "1"]
    command = [sys.executable, "-c", BOTH, *sizes]
    paths = ":".join([str(TOOLS), *filter(None, sys.path)])
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stderr
    for tiles, unit, (largest, mean) in (
        ("none", "images", (2.001, 0.02)),
        ("llava_next", "views", (5.001, 0.1)),
        ("llava_onevision", "views", (5.001, 0.1)),
    ):
        figures = json.loads((tmp_path / f"{tiles}.json").read_text())
        rates = figures[f"{unit}_per_second"]
        assert min(rates.values()) > 0 and figures["ratio"] == pytest.approx(rates["ours"] / rates["DataLoader"])
        assert figures["largest_pixel_difference"] <= largest and figures["mean_pixel_difference"] <= mean, tiles
