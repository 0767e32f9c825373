"""Scores every twin once by the weights that a run starts from: the reference of --preference-loss dpo and mdpo.

    torchrun --nproc-per-node 8 tools/score_reference.py --config DPO.yaml --output F.safetensors [--flag value ...]

Takes the trainer's file and flags, at any layout; those of the optimiser play no part. Train with --reference-scores F
then, at any other layout. The same command goes on where a killed one stopped. A run that is given no file does all
this by itself, at its start.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from hacl_megatron.config.console import exit_with_error, streams_that_may_fail


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, required=True, metavar="F.safetensors", help="file to write")
    return parser.parse_known_args()


def score_reference(output: Path, flags: list[str]) -> None:
    """Write `output` as a run with these flags would score."""
    from hacl_megatron.config.run import parse_run_config
    from hacl_megatron.train import prepare_machine, quiet_libraries, resolved

    quiet_libraries()
    config = parse_run_config(flags)
    if not config.preference.has_reference:
        raise ValueError(
            f"--preference-loss is {config.preference.preference_loss}; give the one to score for: dpo or mdpo"
        )
    # What a run loads, saves and validates on is no matter here.
    config = replace(
        config,
        checkpoint=replace(config.checkpoint, save=None, load=None),
        data=replace(config.data, valid_data_path=[]),
        training=replace(config.training, eval_interval=0, eval_tasks=[], dry_run=False, print_config=False),
        preference=replace(config.preference, reference_scores=None),
    )
    config, layout = resolved(config)
    prepare_machine(config, layout)
    from hacl_megatron.training.build import score_reference

    score_reference(config, layout, output)


if __name__ == "__main__":
    with streams_that_may_fail():
        try:
            args, flags = parse()
            score_reference(args.output, flags)
        except (ValueError, OSError) as error:
            exit_with_error(error)
