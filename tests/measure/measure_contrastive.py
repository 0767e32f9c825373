"""Memory and time of the contrastive loss, forward and backward, beside the plain formula as open_clip computes it.

    python -m tests.measure.measure_contrastive            # 4,096 x (65,536 + 65,536) of width 1,024; 11 GB of memory
    python -m tests.measure.measure_contrastive --local 1024 --pool 16384 --hallucinated 16384

Both sides get the same rows, columns and threads, and run in turn, each time in a process of its own after a small
warm-up. `extra` is the highest anonymous memory of the process (RssAnon, sampled every 2 ms) above what it held
before the forward, less the gradients of the inputs, which both must give. Core seconds are the process's CPU time,
which other processes on the machine disturb less than the wall clock. The plain side has its columns
[captions; hallucinated] as one ready tensor, so that it pays for no concatenation; ours masks duplicates, as in
training, though there are none.
"""

import argparse
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hacl_megatron.objective.contrastive import contrastive_loss
from hacl_megatron.objective.negatives import PairEmbeddings
from hacl_megatron.objective.row_blocks import BLOCK_BYTES
from tests.objective.open_clip_oracle import clip_loss

MIB = 2**20


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def measured(step: Callable[[], Tensor]) -> tuple[Tensor, float, float, int]:
    """What `step` returns, its seconds, its seconds of all cores, and the bytes that it took at most."""
    before, done, highest = anonymous_bytes(), threading.Event(), [0]

    def sample() -> None:
        while not done.wait(0.002):  # torch's operators leave the interpreter to this thread
            highest[0] = max(highest[0], anonymous_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    start, start_cores = time.perf_counter(), time.process_time()
    result = step()
    seconds, core_seconds = time.perf_counter() - start, time.process_time() - start_cores
    done.set()
    sampler.join()
    return result, seconds, core_seconds, highest[0] - before


def inputs(local: int, pool: int, hallucinated: int, width: int) -> dict[str, Tensor]:
    """Leaves, the same in every process; the middle rank's pairs are the pool's, as after a gather."""
    generator = torch.Generator().manual_seed(7)

    def unit(rows: int) -> Tensor:
        embeddings = torch.randn(rows, width, generator=generator)
        return embeddings.div_(embeddings.norm(dim=1, keepdim=True))

    first = first_pair(local, pool)
    images, columns = unit(pool), unit(pool + hallucinated)
    tensors = {
        "image": images[first : first + local].clone(),
        "caption": columns[first : first + local].clone(),
        "pool_image": images,
        "columns": columns,
        "temperature": torch.tensor([0.07]),
    }
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def first_pair(local: int, pool: int) -> int:
    return pool // local // 2 * local


def plain(leaves: dict[str, Tensor], pool: int, _: int) -> Tensor:
    """open_clip's."""
    loss = clip_loss(
        leaves["image"], leaves["caption"], leaves["pool_image"], leaves["columns"],
        first_pair(leaves["image"].shape[0], pool), leaves["temperature"],
    )  # fmt: skip
    loss.backward()
    return loss.detach()


def blocks(leaves: dict[str, Tensor], pool: int, block_bytes: int) -> Tensor:
    """This project's."""
    local, hallucinated = leaves["image"].shape[0], leaves["columns"].shape[0] - pool
    first, keys = first_pair(local, pool), torch.arange(pool)
    # Leaves of their own: slices of one leaf would each add a whole gradient of it, which no gathered pool does.
    captions, texts = (part.detach().requires_grad_() for part in leaves["columns"].split([pool, hallucinated]))
    own = PairEmbeddings(
        image=leaves["image"],
        caption=leaves["caption"],
        hallucinated=texts[:0].detach(),
        hallucinated_owner=keys[:0],
        image_keys=keys[first : first + local],
        caption_keys=keys[first : first + local],
        hallucinated_keys=keys[:0],
    )
    everyone = PairEmbeddings(
        image=leaves["pool_image"],
        caption=captions,
        hallucinated=texts,
        hallucinated_owner=torch.arange(hallucinated) * pool // max(hallucinated, 1),
        image_keys=keys,
        caption_keys=keys,
        hallucinated_keys=pool + torch.arange(hallucinated),
    )
    terms = contrastive_loss(
        own,
        everyone,
        first,
        leaves["temperature"],
        hallucination_negatives="all",
        mask_duplicates=True,
        block_bytes=block_bytes,
    )
    loss = (terms.image_to_text_sum + terms.text_to_image_sum) / (2 * local)
    loss.backward()
    leaves["captions"], leaves["hallucinated"] = captions, texts
    return loss.detach()


SIDES = {"plain": plain, "blocks": blocks}


def run_side(connection: Any, side: str, size: tuple[int, int, int, int], block_bytes: int, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    SIDES[side](inputs(8, 32, 16, size[3]), 32, block_bytes)
    leaves = inputs(*size)
    loss, seconds, core_seconds, extra = measured(lambda: SIDES[side](leaves, size[1], block_bytes))
    extra -= sum(leaf.numel() * leaf.element_size() for leaf in inputs_of(leaves))
    columns = leaves["columns"].grad
    if columns is None:
        columns = torch.cat([leaves["captions"].grad, leaves["hallucinated"].grad])
    some = slice(None, None, max(columns.shape[0] // 512, 1))
    connection.send(
        {
            "loss": loss.numpy(),
            "seconds": seconds,
            "core_seconds": core_seconds,
            "extra": extra,
            "gradients": {
                "columns": columns[some].numpy(),
                "image": leaves["image"].grad.numpy(),
                "pool_image": leaves["pool_image"].grad[some].numpy(),
                "caption": leaves["caption"].grad.numpy(),
                "temperature": leaves["temperature"].grad.numpy(),
            },
        }
    )


def inputs_of(leaves: dict[str, Tensor]) -> list[Tensor]:
    return [leaves[name] for name in ("image", "caption", "pool_image", "columns", "temperature")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local", type=int, default=4096, help="pairs of this rank")
    parser.add_argument("--pool", type=int, default=65536, help="pairs of all ranks: a multiple of --local")
    parser.add_argument("--hallucinated", type=int, default=65536, help="hallucinated captions of all ranks")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--block-mib", type=int, default=BLOCK_BYTES // MIB, help="most that one block may take")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    flags = parser.parse_args()
    size = (flags.local, flags.pool, flags.hallucinated, flags.width)

    context = multiprocessing.get_context("spawn")
    results: dict[str, list[dict]] = {side: [] for side in SIDES}
    for repeat in range(flags.repeats):
        for side in list(SIDES)[:: 1 if repeat % 2 == 0 else -1]:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=run_side, args=(sender, side, size, flags.block_mib * MIB, flags.threads))
            process.start()
            sender.close()
            result = receiver.recv()
            process.join()
            results[side].append(result)
            print(
                f"{side:7} {result['seconds']:8.2f} s ({result['core_seconds']:8.2f} core seconds)   "
                f"extra {result['extra'] / MIB:9.1f} MiB",
                flush=True,
            )

    ratios = {}
    for name in ("seconds", "core_seconds", "extra"):
        medians = {side: statistics.median(result[name] for result in results[side]) for side in SIDES}
        ratios[name] = medians["blocks"] / medians["plain"]
    print(
        f"medians of {flags.repeats}, blocks / plain: time {ratios['seconds']:.3f}, core seconds "
        f"{ratios['core_seconds']:.3f}, extra memory {ratios['extra']:.4f}"
    )
    ours, theirs = results["blocks"][0], results["plain"][0]
    print(f"loss: {ours['loss']:.7f}, plain {theirs['loss']:.7f}")
    for name, gradient in ours["gradients"].items():
        error = abs(gradient - theirs["gradients"][name]).max() / abs(theirs["gradients"][name]).max()
        print(f"gradient of {name}: largest difference {error:.1e} of the largest entry")


if __name__ == "__main__":
    main()
