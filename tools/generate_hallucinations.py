"""Adds "Hallucination caption" to a LLaVA JSON or JSONL file: captions with errors written in, HACL's hard negatives.

    python tools/generate_hallucinations.py --method rules --input F.json --output G.json [--num-workers 8]
    OPENAI_API_KEY=... python tools/generate_hallucinations.py --method llm --model NAME [--base-url URL] ...

`rules` exchanges objects, attributes, counts, actions and relations by word lists: offline, the same for the same
--seed. `llm` asks any OpenAI-compatible endpoint as the paper asks GPT-4, and checks every answer; the answers are kept
in G.json.answers.jsonl, from which the same command goes on after a stop, and what was refused is in
G.json.rejected.jsonl.
The caption is a record's "text", else its first answer; of several images "text" lists one each. Records without one
stay as they are, and so do those that hold hallucinated captions already (unless --replace). The rules' "Hallucination
edits" say what was changed.

Many processes share the work with --num-shards N and each its --shard-index, from 0; then one with --num-shards N
--merge writes what a single process would have written. JSON lines are divided among them, a JSON list is not.
"""

import argparse
from pathlib import Path

from hacl_megatron.config.console import exit_with_error, report_error, say, streams_that_may_fail


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("rules", "llm"), required=True, help="how captions are falsified")
    parser.add_argument("--input", required=True, type=Path, help="LLaVA records: a JSON list, or .jsonl")
    parser.add_argument("--output", required=True, type=Path, help="file to write, .json or .jsonl")
    parser.add_argument("--per-caption", type=int, default=1, help="hallucinated captions for each caption")
    parser.add_argument("--seed", type=int, default=1234, help="of the rules' choices")
    parser.add_argument("--num-workers", type=int, default=1, help="processes for the rules")
    parser.add_argument("--replace", action="store_true", help="also where a record has hallucinated captions already")
    parser.add_argument("--report", type=Path, help="page with numbers and examples side by side, .html or .md")
    parser.add_argument("--force", action="store_true", help="replace an existing --output (never the answers)")
    parser.add_argument("--num-shards", type=int, default=1, help="processes that share the work, on any nodes")
    parser.add_argument("--shard-index", type=int, help="which of them this one is, from 0")
    parser.add_argument("--merge", action="store_true", help="join what the processes of --num-shards have done")
    llm = parser.add_argument_group("--method llm", "the key is read from OPENAI_API_KEY alone")
    llm.add_argument("--model", help="the endpoint's name of the model")
    llm.add_argument("--base-url", help="e.g. http://localhost:8000/v1; default: OPENAI_BASE_URL, or OpenAI")
    llm.add_argument("--concurrency", type=int, default=8, help="requests under way at once")
    llm.add_argument("--requests-per-minute", type=float, help="at most so many, retries included")
    llm.add_argument("--timeout", type=float, default=60.0, help="seconds for one request as a whole")
    llm.add_argument("--max-retries", type=int, default=6, help="of a request that failed (with back-off)")
    llm.add_argument("--attempts", type=int, default=3, help="answers asked for before a caption is given up")
    llm.add_argument("--temperature", type=float, default=1.0)
    llm.add_argument("--max-tokens", type=int, default=512, help="of one answer; longer ones are refused")
    llm.add_argument("--fill-with-rules", action="store_true", help="write by rules what the model did not")
    args = parser.parse_args()
    if args.method == "llm" and not args.model:
        parser.error("--method llm needs --model, the endpoint's name of the model")
    for name in ("per_caption", "concurrency", "attempts", "max_tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; expected at least 1")
    for name in ("num_workers", "max_retries"):
        if getattr(args, name) < 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; expected at least 0")
    if args.timeout <= 0 or (args.requests_per_minute is not None and args.requests_per_minute <= 0):
        parser.error("--timeout and --requests-per-minute are above 0")
    if args.report and args.report.suffix not in (".html", ".md"):
        parser.error(f"--report {args.report}: expected a name that ends in .html or .md")
    return args


def generate(args: argparse.Namespace) -> int:
    """The exit status: 1 where a language model answered nothing of use."""
    from hacl_megatron.data.prepare.share import check_sharing, uneven
    from hacl_megatron.hallucinate.ask import Endpoint
    from hacl_megatron.hallucinate.files import is_done, merge_shares, settings_of, share_target, write_done
    from hacl_megatron.hallucinate.run import check_paths, generate_by_llm, generate_by_rules

    share = check_sharing(args.num_shards, args.shard_index, args.merge)
    settings, target = {}, args.output
    if args.num_shards > 1:
        if args.report:
            raise ValueError("--report tells of the records of one process; leave it out with --num-shards")
        names = ("method", "seed", "per_caption", "replace", "model", "temperature", "attempts", "fill_with_rules")
        check_paths(args.input, args.output, force=True)
        settings = settings_of(args.input, **{name: getattr(args, name) for name in names})
        check_paths(args.input, args.output, force=args.force or args.merge)
    if args.merge:
        size = merge_shares(args.output, args.num_shards, settings, force=args.force)
        print(f"written to {args.output}, {size:,} bytes")
        return 0
    if share is not None:
        target = share_target(args.output, share)
        if is_done(target, settings):
            print(f"share {share} is done already")
            return 0
        if (line := uneven([str(args.input)], share.count)) is not None:
            say(f"note: {line}")
    check_paths(args.input, target, force=args.force or share is not None)
    shared = {"per_caption": args.per_caption, "replace": args.replace, "share": share}
    if args.method == "rules":
        totals = generate_by_rules(args.input, target, seed=args.seed, workers=args.num_workers, **shared)
    else:
        endpoint = Endpoint(
            model=args.model,
            base_url=args.base_url,
            concurrency=args.concurrency,
            requests_per_minute=args.requests_per_minute,
            timeout=args.timeout,
            max_retries=args.max_retries,
            temperature=args.temperature,
            max_tokens=args.max_tokens,
        )
        fill_seed = args.seed if args.fill_with_rules else None
        totals = generate_by_llm(args.input, target, endpoint, attempts=args.attempts, fill_seed=fill_seed, **shared)
    say(totals.summary())
    say(totals.report.for_terminal())
    if args.report:
        totals.report.write(args.report)
    if totals.asked and totals.unanswered == totals.asked:
        report_error(
            f"none of {totals.asked:,} captions got a usable answer, the last: {totals.last_refusal}; all are in "
            f"{target}.rejected.jsonl: check --model and --base-url, and start again with --force"
        )
        return 1
    if share is not None:
        write_done(target, settings)
        print(f"share {share} is done; --merge, when all {share.count} are")
    return 0


if __name__ == "__main__":
    with streams_that_may_fail():
        try:
            raise SystemExit(generate(parse()))
        except (ValueError, OSError) as error:
            exit_with_error(error)
        except KeyboardInterrupt:
            exit_with_error("interrupted; --output is not written, the same command goes on from the answers so far")
