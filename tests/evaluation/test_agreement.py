"""`--verify`: our side of the comparison, where it runs."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hacl_megatron.checkpoint.convert.reader import ShardedReader
from hacl_megatron.checkpoint.hf.config_read import read_model_config
from hacl_megatron.checkpoint.run.folder import locate_checkpoint
from hacl_megatron.evaluation.agreement import our_logits, random_batch
from tests.distributed import run_distributed
from tests.tiny import write_tiny_llava
from tests.tool_runs import apart, to_hf, to_megatron


def logits_as_a_slurm_task(save: Path) -> None:
    """As a batch script finds itself: Slurm has promised several tasks, and this one process was not started as one."""
    reader = ShardedReader(locate_checkpoint(save))
    batch = random_batch(reader.model_config)
    joined = our_logits(reader, batch, None)
    dist.destroy_process_group()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        del os.environ[name]
    os.environ.update(SLURM_NTASKS="8", SLURM_PROCID="0")
    alone = our_logits(reader, batch, None)
    assert torch.equal(alone, joined)
    assert not dist.is_initialized()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # which `run_distributed` takes down


def test_one_process_verifies_whatever_slurm_has_promised(tmp_path: Path) -> None:
    """Catches a number of processes taken from the environment, where several tasks without torchrun are refused, and a
    process group left behind."""
    save = to_megatron(write_tiny_llava(tmp_path / "source"), tmp_path / "save")
    run_distributed(logits_as_a_slurm_task, 1, save)


@pytest.mark.parametrize("image_token", [0, 3, 10, 330])
def test_the_image_token_may_lie_anywhere(tmp_path: Path, image_token: int) -> None:
    """Catches texts drawn from below the image's id alone, where there may be none, and texts that hold it, where
    transformers finds more images than there are."""
    source, path = write_tiny_llava(tmp_path / "in", layers=1, vision_layers=2), tmp_path / "in" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_token_index": image_token}))
    config = read_model_config(source)
    drawn = torch.cat([random_batch(config, seed=seed).target_ids for seed in range(50)])
    assert set(drawn.tolist()) == set(range(3, 331)) - {image_token}
    if image_token == 3:
        save, _ = apart(to_megatron, source, tmp_path / "save", "--verify")
        apart(to_hf, save, tmp_path / "out", "--verify")
