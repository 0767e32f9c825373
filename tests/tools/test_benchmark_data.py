"""The input benchmark on a handful of images: both ways run, and make the same pixels."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "benchmark_data.py"


@pytest.mark.timeout(300)
def test_both_ways_run_and_make_the_same_pixels(tmp_path):
    sizes = ["--drawn-images", "12", "--micro-batch-size", "2", "--steps", "2", "--repetitions", "1"]
    command = [sys.executable, str(TOOL), *sizes, "--save", str(tmp_path / "figures.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    rates = figures["images_per_second"]
    assert min(rates.values()) > 0 and figures["ratio"] == pytest.approx(rates["ours"] / rates["DataLoader"])
    assert figures["largest_pixel_difference"] <= 2.001 and figures["mean_pixel_difference"] <= 0.02
