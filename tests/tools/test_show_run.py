"""tools/show_run.py over folders that hold what a run leaves, whole, half written and hostile."""

import json
import os
import pty
import re
import subprocess
import sys
import time
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hacl_megatron.platform.folder_lock import DEAD_SECONDS, FolderLock, Holder
from hacl_megatron.training.reporting.run_files import read_run
from hacl_megatron.training.reporting.run_view import CurveView, RunView, duration
from tests.tool_runs import TOOLS, run_tool

EVIL = "<script>alert(1)</script>\x1b[2J\u202e"


def write_lines(path: Path, records: list[dict], half: str = "") -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + half, encoding="utf-8")


def write_checkpoint(save: Path, iteration: int, *, lr: float, **listed: object) -> None:
    folder = save / f"iter_{iteration:07d}"
    folder.mkdir()
    (folder / "run_config.yaml").write_text(f"lr: {lr}\nsave: {save}\nmodel:\n  language:\n    num_layers: 4\n")
    files = {"a.distcp": 3_000_000, "common.pt": 500_000, "../frozen/0123456789abcdef/b.distcp": 7_000_000}
    (folder / "files.json").write_text(json.dumps({"files": files, **listed}))


@pytest.fixture
def save(tmp_path: Path) -> Path:
    """A run of 100 iterations that has come to 40 and is being written to."""
    folder = tmp_path / "run"
    folder.mkdir()
    records = [
        {"iteration": i, "lm loss": 4 - i / 20, "iteration-time": 2.0, "samples-per-second": 32.0, EVIL: 1.0}
        for i in range(1, 41)
    ]
    records[19]["lm loss validation"], records[39]["lm loss validation"] = 3.25, 2.5
    write_lines(folder / "metrics.jsonl", records, half='{"iteration": 41, "lm lo')
    bad = [{"iteration": 1, "name": EVIL, "source": "a.jpg", "reason": "the file is empty"}] * 3
    write_lines(folder / "bad_samples.jsonl", [*bad, {"class": "trains nothing", "reason": EVIL, "name": "7"}])
    write_checkpoint(folder, 20, lr=0.002)
    write_checkpoint(folder, 40, lr=0.001, not_finite="lm_head")
    (folder / "iter_0000060.partial").mkdir()
    tell(folder, changes=["not as in the run that is resumed: --lr 0.001 (was 0.002)"])
    return folder


def tell(save: Path, *, state: str = "running", **facts: object) -> None:
    """What the run's own process would write."""
    holder = Holder.this_process()
    told = {"state": state, "iteration": 40, "train_iters": 100, "host": holder.host, "pid": holder.pid, **facts}
    (save / "run_status.json").write_text(json.dumps(told))


def shown(save: Path, capfd: pytest.CaptureFixture) -> str:
    assert run_tool("show_run", save) == 0
    return capfd.readouterr().out


def test_a_run_is_told_at_a_glance(save: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a number that is missing, of the wrong place, or a half-written line that is taken or complained of."""
    monkeypatch.setenv("COLUMNS", "100")
    lock = FolderLock(save, what="run")
    lock.take()
    try:
        text = shown(save, capfd)
    finally:
        lock.release()
    assert text.splitlines()[0] == f"{save}  running"
    text = re.sub(" +", " ", text.replace("\n", " \n "))
    assert "40 of 100 (40%)" in text and "32 samples/s, 2 s a step" in text and "time left 2 min" in text
    assert "lm loss " in text and "2 to 3.95" in text and "\u2800" in text  # braille
    assert "validation at iteration 40" in text and "2.5 -0.75 since the one before" in text
    assert "3 unusable the file is empty" in text and "1 trains nothing " in text
    assert " 40 3.5 MB " in text and "holds values that are not finite" in text
    assert "iter_0000060.partial" in text and "being written" in text
    assert "not as in the run that is resumed: --lr 0.001 (was 0.002)" in text
    assert "checkpoint 40, unlike the one before: --lr 0.001 (was 0.002) \n" in text  # and no word of what is equal
    assert "note:" not in text, text


def test_nothing_of_a_file_commands_the_terminal_and_no_colour_where_none_looks(save: Path, capfd) -> None:
    """Catches control characters passed on, and escape sequences of our own in a pipe."""
    text = shown(save, capfd)
    assert "\x1b" not in text and "\u202e" not in text and "\\x1b[2J" in text


def test_a_terminal_gets_colours_unless_it_wants_none(save: Path) -> None:
    tell(save, state="failed", reason=EVIL)
    seen = {}
    for wanted in ("", "NO_COLOR"):
        leader, follower = pty.openpty()
        environment = {**os.environ, **({wanted: "1"} if wanted else {})}
        command = [sys.executable, str(TOOLS / "show_run.py"), str(save)]
        process = subprocess.Popen(command, stdout=follower, env=environment)
        os.close(follower)
        seen[wanted] = b""
        try:
            while part := os.read(leader, 1 << 16):
                seen[wanted] += part
        except OSError:  # Linux, once the other end is closed
            pass
        os.close(leader)
        assert process.wait() == 0
    assert b"\x1b[1m" in seen[""] and b"\x1b[2J" not in seen[""] and b"\x1b" not in seen["NO_COLOR"]


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ("running", "cut off without a word"),  # nobody holds the folder
        ("finished", "finished"),
        ("failed", "failed; the same start would fail again: no room"),
        ("hung", "hung, and was ended: no room"),
        (["odd"], "['odd']: no room"),
    ],
)
def test_the_state_is_what_the_file_says_unless_nobody_lives(save: Path, capfd, state: object, says: str) -> None:
    """Catches a killed run that is called running for ever."""
    tell(save, state=state, reason="no room" if state not in ("running", "finished") else None)
    assert shown(save, capfd).splitlines()[0] == f"{save}  {says}" + (
        ": killed, or its node was lost" if state == "running" else ""
    )


def test_a_holder_elsewhere_lives_as_long_as_it_is_heard_of(save: Path, capfd) -> None:
    """Catches a run on another host that counts as dead, and one silent for an hour that counts as alive."""
    elsewhere = {**asdict(Holder.this_process()), "host": "n7", "pid": 12, "machine": "another boot"}
    tell(save, host="n7", pid=12)
    (save / "run.lock").write_text(json.dumps(elsewhere))
    assert shown(save, capfd).splitlines()[0] == f"{save}  running"
    os.utime(save / "run.lock", (0, time.time() - DEAD_SECONDS - 30))
    assert "cut off without a word" in shown(save, capfd).splitlines()[0]
    tell(save, host="n6", pid=12)  # of the run before, which was killed
    os.utime(save / "run.lock")
    assert "starting" in shown(save, capfd).splitlines()[0]


class Page(HTMLParser):
    """Tags, addresses and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags, self.addresses, self.text = set(), [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [value for key, value in attrs if key in ("src", "href", "srcset", "action")]

    def handle_data(self, data):
        self.text += data


def test_the_page_says_the_same_and_loads_nothing(save: Path, tmp_path: Path, capfd) -> None:
    """Catches text that is not escaped, something fetched from elsewhere, and a page that lacks what the lines have."""
    assert run_tool("show_run", save, "--html", tmp_path / "page.html") == 0
    page = Page(tmp_path / "page.html")
    assert not page.addresses and "script" not in page.tags and page.tags >= {"svg", "polyline", "table"}
    source = (tmp_path / "page.html").read_text()
    assert "url(" not in source and "@import" not in source and "\x1b" not in source
    capfd.readouterr()
    for line in ("40 of 100 (40%)", "<script>alert(1)</script>\\x1b[2J\\u202e", "--lr 0.001 (was 0.002)", "3.5 MB"):
        assert line in page.text and line in shown(save, capfd)


def test_what_is_no_run_is_said_in_one_line(tmp_path: Path, save: Path, capfd: pytest.CaptureFixture) -> None:
    """Catches an empty report of a mistyped folder, and a traceback."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for folder, says in (
        (tmp_path / "gone", "no such folder; expected the SAVE folder of a run"),
        (tmp_path / "file", "no such folder"),
        (tmp_path / "empty", "holds no run: found neither run_status.json nor metrics.jsonl nor iter_* folders"),
        (tmp_path, "there are runs in it: run"),
        (save / "iter_0000020", f"is one checkpoint; give the folder it is in, {save}"),
    ):
        assert run_tool("show_run", folder) == 2
        out, err = capfd.readouterr()
        assert not out and err.count("\n") == 1 and says in err, err


def test_files_that_no_run_wrote_cost_notes_not_the_report(save: Path, capfd: pytest.CaptureFixture) -> None:
    """Catches a report that one damaged file prevents, and damage that nobody hears of."""
    text = (save / "metrics.jsonl").read_text()
    (save / "metrics.jsonl").write_text('no json\n[1]\n{"iteration": "x", "lm loss": 1}\n' + "[" * 9999 + "\n" + text)
    with (save / "metrics.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"iteration": 42, "lm loss": 10**400, "grad-norm": True}) + "\n")
    (save / "run_status.json").write_text('["no status"]')
    (save / "iter_0000040" / "run_config.yaml").write_text("lr: [")
    (save / "bad_samples.jsonl").unlink()
    os.mkfifo(save / "bad_samples.jsonl")
    text = shown(save, capfd)
    assert "40" in text and "says nothing of its state" in text and "grad-norm" not in text
    assert "note: 4 lines of metrics.jsonl are no records, and are left out" in text  # the half line is one by now
    assert "note: iter_0000040: " in text and "note: bad_samples.jsonl cannot be read: is a named pipe" in text


def test_it_starts_fast_and_stops_with_its_reader(save: Path) -> None:
    """Catches an import of torch or transformers, and a traceback behind `| head -1`."""
    program = (
        "import runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[0].rpartition('/')[0])\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "print(*{'torch', 'transformers', 'numpy', 'megatron', 'jinja2'} & {*sys.modules}, file=sys.stderr)"
    )
    command = [sys.executable, "-c", program, str(TOOLS / "show_run.py"), str(save)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    process.stdout.close()  # before a word is written
    assert process.stderr.read() == b"\n" and process.wait() == 0


def test_curves_are_drawn_where_their_numbers_are() -> None:
    """Catches a curve upside down, one out of its frame, and a validation on another scale."""
    curve = CurveView(tag="x", last="", first="", between="", points=[(1, 0.0), (3, 4.0)], held_out=[(2, 1.0)])
    assert curve.svg(100, 40) == ("0.0,40.0 100.0,0.0", "50.0,30.0 50.0,30.0")
    assert CurveView(tag="x", last="", first="", between="", points=[(5, 1.0)], held_out=[]).svg(100, 40)[0]


def test_long_runs_are_thinned_by_means(save: Path) -> None:
    """Catches a page of 100,000 points, and thinning that loses the end of a run."""
    write_lines(save / "metrics.jsonl", [{"iteration": i, "lm loss": float(i)} for i in range(1, 5001)])
    (curve,) = RunView.of(read_run(save)).curves
    assert len(curve.points) <= 240 and curve.last == "5,000"
    assert all(abs(x - y) < 1e-9 for x, y in curve.points) and curve.points[-1][0] > 4985


@pytest.mark.parametrize(
    ("seconds", "says"),
    [(0, "0 s"), (59.2, "1 min"), (3700, "1 h 1 min"), (7200, "2 h 0 min"), (90061, "1 d 1 h")],
)
def test_durations(seconds: float, says: str) -> None:
    assert duration(seconds) == says
