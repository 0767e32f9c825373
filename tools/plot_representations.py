"""Draws how a checkpoint represents images, captions and hallucinated captions (HACL's Figure 1), with numbers.

    python tools/plot_representations.py --load CKPT [--before CKPT0] --data-path F.json --image-folder DIR --output DIR

DIR/hidden_states.png and embeddings.png (PCA, t-SNE), representations.json, and both as TensorBoard events in DIR.
Checkpoints are SAVE folders of a run, iter_* folders or Hugging Face LLaVAs; large ones run under torchrun.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoint_arguments import add_data_arguments, add_layout_arguments, load_settings

from hacl_megatron.config.console import exit_with_error, say, streams_that_may_fail


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=Path, required=True, metavar="CKPT")
    parser.add_argument("--before", type=Path, metavar="CKPT0", help="another checkpoint, drawn on the left")
    parser.add_argument("--data-path", nargs="+", type=Path, required=True, metavar="F.json", help="LLaVA JSON with "
                        "`text` and `Hallucination caption`")  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--limit", type=int, default=500, metavar="N", help="take the first N samples (500)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16, on the CPU float32")
    add_data_arguments(parser)
    add_layout_arguments(parser)
    return parser.parse_args()


def records_of(source: Path, run: Any, args: argparse.Namespace) -> list[dict[str, Any]] | None:
    """Representations of all samples on rank 0, None elsewhere. Every rank calls it."""
    from hacl_megatron.assemble.loaded_model import load_model
    from hacl_megatron.checkpoint.run.folder import assets_of
    from hacl_megatron.data.encoding import EncodingSettings
    from hacl_megatron.data.manifest import Manifest
    from hacl_megatron.data.tokenizer import load_tokenizer
    from hacl_megatron.evaluation.likelihood.representations import CollectStates, Representations
    from hacl_megatron.evaluation.likelihood.task_run import TaskRunner

    module, config, task = load_model(source, run), run.config, None
    if run.reads_data:
        manifest = Manifest.read([str(path) for path in args.data_path], version=config.data.version)
        tokenizer = load_tokenizer(str(assets_of(source)))
        task = Representations(manifest, tokenizer, EncodingSettings.of(config), limit=args.limit)
    collect = CollectStates(module, vocab_size=config.architecture.language.vocab_size, tp_group=run.groups.tp)
    runner = TaskRunner.of(module, run, batch_size=args.batch_size, collect=collect)
    records = runner.run(task)
    runner.close()
    return records


def plot(args: argparse.Namespace) -> None:
    from hacl_megatron.train import quiet_libraries

    quiet_libraries()
    import_plotting()
    from hacl_megatron.assemble.loaded_model import forward_config
    from hacl_megatron.assemble.processes import joined_processes

    for name in ("limit", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}, expected at least 1")
    if args.image_folder is None:
        raise ValueError("give --image-folder, the folder that image names are relative to")
    checkpoints = {"before": args.before, "after": args.load} if args.before else {str(args.load.name): args.load}
    settings = load_settings(args)
    models = {name: forward_config(checkpoint, settings) for name, checkpoint in checkpoints.items()}
    _, shown = models[next(reversed(models))]
    for _, config in models.values():  # the same rows for both, as --load was trained
        config.data.version = shown.data.version
        config.objective.contrastive_image_context = shown.objective.contrastive_image_context
    with joined_processes(shown) as run:
        records = {
            name: records_of(source, replace(run, config=config), args) for name, (source, config) in models.items()
        }
    if None not in records.values():
        write(records, {name: str(path) for name, path in checkpoints.items()}, args.output)


def import_plotting() -> None:
    """Raises ValueError where the libraries are missing, before anything is computed."""
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"plots need scikit-learn and matplotlib ({error}): pip install '.[plots]'") from None


def write(records: dict[str, list[dict[str, Any]]], checkpoints: dict[str, str], output: Path) -> None:
    """Pictures, numbers and TensorBoard events."""
    import matplotlib.pyplot as plt
    from torch.utils.tensorboard import SummaryWriter

    from hacl_megatron.evaluation.likelihood.representation_plots import figure
    from hacl_megatron.evaluation.likelihood.representations import SPACES, PointCloud
    from hacl_megatron.evaluation.scores import write_whole

    output.mkdir(parents=True, exist_ok=True)
    errors = [record for part in records.values() for record in part if "error" in record]
    results: dict[str, Any] = {"checkpoints": checkpoints, "unusable": len(errors)}
    with SummaryWriter(str(output)) as board:
        for space in SPACES:
            clouds = {name: PointCloud.of(part, space) for name, part in records.items()}
            measures = results[space] = {name: cloud.measures() for name, cloud in clouds.items()}
            drawn = figure(space, clouds, measures)
            drawn.savefig(output / f"{space.replace(' ', '_')}.png", dpi=110)
            board.add_figure(f"representations/{space}", drawn, close=False)
            plt.close(drawn)
            for step, numbers in enumerate(measures.values()):
                for measure, value in numbers.items():
                    board.add_scalar(f"representations/{space}/{measure}", value, step)
    results["samples"] = len(clouds[next(iter(clouds))].images)
    write_whole(output / "representations.json", json.dumps(results, indent=1) + "\n")
    for space in SPACES:
        for name, numbers in results[space].items():
            print(f"{space}, {name}: " + ", ".join(f"{measure} {value:.3f}" for measure, value in numbers.items()))
    for record in errors[:3]:
        say(f"left out: {record['name']}: {record['error']}")
    print(f"plots: {output}")


if __name__ == "__main__":
    with streams_that_may_fail():
        try:
            plot(parse())
        except (ValueError, OSError) as error:
            exit_with_error(error)
