"""`torchrun … -m hacl_megatron.train --config FILE.yaml [--flag value …]`: parse, check, build, run.

What the flags alone can tell is told before torch and megatron-core are imported, which takes seconds; so the modules
that need them are imported inside functions here. `training.build` builds and trains.
"""

import logging
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

from hacl_megatron.config.checks.architecture import check_architecture
from hacl_megatron.config.checks.files import HoldsAnotherRun
from hacl_megatron.config.checks.flags import check_flags
from hacl_megatron.config.console import (
    exit_with_error,
    is_first_rank,
    notify,
    report_crash,
    report_error,
    streams_that_may_fail,
)
from hacl_megatron.config.layout import Layout, world_size_from_environment
from hacl_megatron.config.run import RunConfig, parse_run_config, to_yaml
from hacl_megatron.data.templates import check_template
from hacl_megatron.platform.folder_lock import FolderInUse
from hacl_megatron.training.reporting.status import TrainingStopped, reason_not_to_restart, write_status

PACKAGE = Path(__file__).parent


def main(argv: Sequence[str] | None = None) -> None:
    """Entry of the trainer; a user's mistake ends it with one line and exit code 2, anything else with 1."""
    with streams_that_may_fail():
        _main(sys.argv[1:] if argv is None else argv)


def _main(argv: Sequence[str]) -> None:
    quiet_libraries()
    try:
        config = parse_run_config(argv)
    except ValueError as error:
        exit_with_error(error)
    except Exception as error:
        if (broken := _broken_library(error)) is None:
            raise
        exit_with_error(broken)
    save = config.checkpoint.save
    if (reason := reason_not_to_restart(save)) is not None:
        exit_with_error(f"not tried again: {reason}")
    try:
        train(config)
    except KeyboardInterrupt:  # before the first step, or in the last lines: `training.signals` hears it in between
        report_error("interrupted (Ctrl-C) outside training: nothing was saved that was not before")
        raise SystemExit(130) from None
    except Exception as error:
        broken = _broken_library(error)
        if broken is None and not _is_for_the_user(error):
            if report_crash(error):
                write_status(save, "crashed", reason=f"{type(error).__name__}: {error}"[:500])
            raise SystemExit(1) from None
        if report_error(broken or error) and not isinstance(error, FolderInUse | HoldsAnotherRun):
            write_status(save, "failed", reason=broken or str(error))
        raise SystemExit(2) from None


def run(argv: Sequence[str]) -> None:
    """Train as the flags say; raises what goes wrong."""
    train(parse_run_config(argv))


def train(config: RunConfig) -> None:
    """Train as `config` says, from the newest checkpoint in `--load` on if there is one."""
    if config.training.dry_run:
        _dry_run(config)
        return
    _refuse_dry_run_flags(config)
    config, layout = resolved(config)
    if config.training.print_config:
        if is_first_rank():
            print(to_yaml(_with_vision_parallel(config, layout, says=False)), end="")
        return
    prepare_machine(config, layout)
    config = _with_vision_parallel(config, layout)
    from hacl_megatron.training import build

    build.train(config, layout)


def resolved(config: RunConfig) -> tuple[RunConfig, Layout]:
    """What the flags leave to checkpoints filled in, and the layout; ValueError for all that can be told by now."""
    layout = check_flags(config, world_size_from_environment())
    check_template(config.data.version)
    from hacl_megatron.assemble.start_from import resolve

    config = resolve(config)
    check_architecture(config, layout)
    return config, layout


def prepare_machine(config: RunConfig, layout: Layout) -> None:
    """Before megatron-core and Transformer Engine are imported: what they do with a GPU, they do with this rank's."""
    from hacl_megatron.platform.processes import prepare_device, select_device
    from hacl_megatron.platform.requirements import check_machine

    device = select_device(config.parallel.device, layout.tp, layout.cp)
    prepare_device(device)
    check_machine(config, device)


def _dry_run(config: RunConfig) -> None:
    training = config.training
    layout = check_flags(config, training.world_size or world_size_from_environment(), files=False)
    check_template(config.data.version)
    from hacl_megatron.assemble import start_from
    from hacl_megatron.plan.dry_run import dry_run

    config = start_from.resolve(config, planned=True)
    check_architecture(config, layout)
    config = _with_vision_parallel(config, layout)
    resumes = start_from.checkpoint_to_resume(config)
    sources = (config.model.pretrained_checkpoint, config.model.tokenizer) if resumes is None else ()
    given = [Path(source) for source in sources if source is not None]
    if (given or resumes) and all(source.is_dir() for source in given):
        for line in start_from.refuse_without_export(config, resumes):
            notify(line)
    notify(dry_run(config, layout, rank=training.dry_run_rank))


def _with_vision_parallel(config: RunConfig, layout: Layout, *, says: bool = True) -> RunConfig:
    """`config` with `--vision-parallel` as a plan chooses it, if the flag is not given, and a line on that."""
    if layout.tp == 1:
        return config
    from hacl_megatron.plan.vision_parallel import with_vision_parallel

    config, line = with_vision_parallel(config, layout)
    if line is not None and says:
        notify(line)
    return config


def _refuse_dry_run_flags(config: RunConfig) -> None:
    for name in ("world_size", "dry_run_rank"):
        if getattr(config.training, name) is not None:
            flag = name.replace("_", "-")
            raise ValueError(
                f"--{flag} is given without --dry-run; a run takes its processes from torchrun: leave it out"
            )


def _broken_library(error: Exception) -> str | None:
    """One line, if megatron-core's import failed because of a library that is installed but broken."""
    from hacl_megatron.platform.accelerators import broken_import

    return broken_import(error)


def _is_for_the_user(error: BaseException) -> bool:
    """Raised by this package's own code, and so written for the user; anything else keeps its traceback."""
    if isinstance(error, TrainingStopped):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, ValueError) and Path(frames[-1].filename).is_relative_to(PACKAGE)


def quiet_libraries() -> None:
    """Hide what megatron-core says on import about libraries that a machine need not have."""
    warnings.filterwarnings("ignore", module=r"megatron\..*|torch\.distributed\..*")
    logging.getLogger("megatron").setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
