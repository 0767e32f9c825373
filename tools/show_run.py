"""Shows a run at a glance: state, speed, losses as small curves, the last validation, bad samples, checkpoints.

    python tools/show_run.py SAVE
    python tools/show_run.py SAVE --html page.html        # the same as one file, which loads nothing else

SAVE is what --save of the trainer names. It is read alone, and may be written by its run meanwhile.
"""

import argparse
import importlib.util
import os
import shutil
import sys
from pathlib import Path

from hacl_megatron.config.console import exit_with_error, printable, say, streams_that_may_fail

TEMPLATE = Path(__file__).with_name("show_run.html.j2")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("save", type=Path, metavar="SAVE", help="folder of a run")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page in place of lines")
    return parser.parse_args()


def show(args: argparse.Namespace) -> None:
    from hacl_megatron.training.reporting.run_files import read_run
    from hacl_megatron.training.reporting.run_view import RunView, lines_of

    view = RunView.of(read_run(args.save))
    if args.html is not None:
        write_page(view, args.html)
        return
    width = shutil.get_terminal_size().columns
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    curves = "utf" in (sys.stdout.encoding or "").lower()
    if curves and importlib.util.find_spec("plotille") is None:
        curves = False
        print("note: no curves without plotille, which setup.py lists: pip install plotille", file=sys.stderr)
    for line in lines_of(view, width=width, colour=colour, curves=curves):
        print(line)


def write_page(view, target: Path) -> None:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(view=view)
    target.write_text(page, encoding="utf-8")
    say(f"{target}: {view.title}, {view.state}")


if __name__ == "__main__":
    with streams_that_may_fail(output_is_all=True):
        try:
            show(parse())
        except (ValueError, OSError) as error:
            exit_with_error(error)
