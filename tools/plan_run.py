"""Says what a run will need before any GPU is asked for: parameters, memory, traffic, time, checkpoints.

    python tools/plan_run.py --config FILE.yaml --nodes 2 --gpu a100-80g [--suggest] [--flag value ...]

Every flag of the trainer can be given and beats the file. No weights and no data are needed where the file has a
`model:` section. Bytes of weights, gradients and optimiser state are exact; the rest are estimates, from assumptions
that are printed and can be changed. The exit status is 1 if the run does not fit.
"""

import argparse
from dataclasses import replace

from hacl_megatron.config.console import exit_with_error, streams_that_may_fail


def parse() -> tuple[argparse.Namespace, list[str]]:
    from hacl_megatron.platform.hardware import GIB, GPUS, Cluster

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--nodes", type=_positive(int), default=1, help="default: 1")
    parser.add_argument("--gpus-per-node", type=_positive(int), default=8, help="default: 8")
    parser.add_argument("--gpu", choices=GPUS, default="h100-80g", help="default: h100-80g")
    parser.add_argument("--suggest", action="store_true", help="also rank the layouts of these GPUs that fit")
    machine = parser.add_argument_group("assumed of the machine")
    machine.add_argument(
        "--compute-efficiency", type=_positive(float),
        help="share of the peak FLOP/s (of FP8's with transformer: {fp8: ...}) that matrix products reach; "
        f"default: {Cluster.compute_efficiency}, in FP8 {Cluster.fp8_efficiency}",
    )  # fmt: skip
    machine.add_argument(
        "--bandwidth-efficiency", type=_positive(float), default=Cluster.bandwidth_efficiency,
        help="share of the links' bandwidth that collectives reach; default: %(default)s",
    )  # fmt: skip
    machine.add_argument(
        "--reserve-gib", type=_positive(float), default=Cluster.reserve / GIB,
        help="GiB for CUDA's context, NCCL and fragmentation; default: %(default)s",
    )  # fmt: skip
    data = parser.add_argument_group("assumed of the data (averages); defaults: LLaVA-1.5's, by --version")
    data.add_argument("--num-samples", type=_positive(int), help="entries of the data files")
    data.add_argument("--image-share", type=float, help="share of the samples with an image")
    data.add_argument("--images-per-sample", type=_positive(float), help="images of a sample that has any; default: 1")
    data.add_argument(
        "--image-size", type=_size, metavar="WIDTHxHEIGHT",
        help="of pictures in pixels, from which the tiles of models that cut them follow; default: 640x480",
    )  # fmt: skip
    data.add_argument("--text-tokens", type=float, help="tokens of a dialogue beside the image's")
    data.add_argument("--target-tokens", type=float, help="tokens of a dialogue that are trained on")
    data.add_argument("--question-tokens", type=float, help="tokens of a dialogue's text before its first answer")
    data.add_argument("--pair-share", type=float, help="share of the samples that are image-caption pairs")
    data.add_argument("--caption-tokens", type=float, help="tokens of a caption, BOS and EOS included")
    data.add_argument("--hallucinated-per-pair", type=float, help="hallucinated captions of a pair")
    return parser.parse_known_args()


def _positive(kind: type):
    def convert(text: str):
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not more than 0")
        return value

    return convert


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"{text!r} is no size, expected one such as 640x480")
    return int(width), int(height)


def plan_run(args: argparse.Namespace, flags: list[str]) -> int:
    from hacl_megatron.assemble.start_from import resolve
    from hacl_megatron.config.checks.architecture import check_architecture
    from hacl_megatron.config.checks.flags import check_flags
    from hacl_megatron.config.run import parse_run_config
    from hacl_megatron.data.templates import check_template
    from hacl_megatron.plan.planner import make_plan
    from hacl_megatron.plan.report import ranking, report
    from hacl_megatron.plan.suggest import suggest_layouts
    from hacl_megatron.plan.vision_parallel import faster_way, plans_by_way, with_vision_parallel
    from hacl_megatron.plan.workload import Samples, assumed_samples
    from hacl_megatron.platform.hardware import GIB, Cluster

    config = parse_run_config(flags)
    check_template(config.data.version)
    config = resolve(config, planned=True)
    world_size = args.nodes * args.gpus_per_node
    cluster = Cluster(
        gpu_name=args.gpu,
        gpus_per_node=args.gpus_per_node,
        compute_efficiency=args.compute_efficiency or Cluster.compute_efficiency,
        fp8_efficiency=args.compute_efficiency or Cluster.fp8_efficiency,
        bandwidth_efficiency=args.bandwidth_efficiency,
        reserve=args.reserve_gib * GIB,
    )
    given = {name: getattr(args, name) for name in vars(assumed_samples(config)) if getattr(args, name) is not None}
    samples: Samples = replace(assumed_samples(config), **given)
    fits = True
    try:
        layout = check_flags(config, world_size, files=False)
        check_architecture(config, layout)
    except ValueError as error:
        if not args.suggest:
            raise
        print(f"as the file has it: {error}\n")
    else:
        chosen, line = with_vision_parallel(config, layout)
        if line is not None:
            faster = faster_way(plans_by_way(config, layout, cluster, samples))
            instead = f"; by what is assumed here {faster} is faster: give --vision-parallel {faster}"
            print(line + instead * (faster != chosen.parallel.vision_parallel) + "\n")
        plan = make_plan(chosen, layout, cluster, samples)
        fits = plan.fits
        print(report(plan))
    if args.suggest:
        found = suggest_layouts(config, world_size, cluster, samples)
        fits = bool(found)
        print(f"\n{ranking(found)}")
    return 0 if fits else 1


if __name__ == "__main__":
    with streams_that_may_fail(output_is_all=True):
        try:
            raise SystemExit(plan_run(*parse()))
        except (ValueError, OSError) as error:
            exit_with_error(error)
