"""`--lora-*`: what they come to, what is refused, and which adapters a run has that starts from a checkpoint."""

import pytest

from hacl_megatron.config.checks.flags import check_flags
from hacl_megatron.config.flags import LoraFlags
from hacl_megatron.config.lora import TARGETS, Lora, is_lora, settle_lora
from hacl_megatron.config.run import RunConfig, from_yaml, parse_run_config, to_yaml
from hacl_megatron.training.packs import has_dropout, pack_plan


def checked(*arguments: str) -> RunConfig:
    config = parse_run_config(["--data-path", "a.json", "--train-iters", "1", *arguments])
    check_flags(config, 1, files=False)
    return config


def test_defaults_are_those_of_llavas_recipe() -> None:
    assert Lora.of(checked().lora) is None
    lora = Lora.of(checked("--lora-rank", "128").lora)
    assert (lora.rank, lora.alpha, lora.scale, lora.targets) == (128, 256, 2.0, TARGETS)
    some = checked("--lora-rank", "8", "--lora-alpha", "4", "--lora-target-modules", "up_proj", "q_proj")
    assert Lora.of(some.lora) == Lora(rank=8, alpha=4.0, dropout=0.0, targets=("q_proj", "up_proj"))
    assert from_yaml(to_yaml(some)).lora == some.lora


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lora-rank", "0"], ["--lora-rank is 0", "at least 1"]),
        (["--lora-rank", "8", "--lora-alpha", "0"], ["--lora-alpha is 0", "more than 0"]),
        (["--lora-rank", "8", "--lora-dropout", "1"], ["--lora-dropout is 1", "< 1"]),
        (["--lora-rank", "8", "--lora-target-modules", "q_proj", "upproj"], ["upproj", "did you mean up_proj"]),
        (["--lora-rank", "8", "--lora-target-modules", "lm_head"], ["lm_head", "expected some of q_proj"]),
        (["--lora-alpha", "16"], ["--lora-alpha", "without --lora-rank"]),
        (["--lora-target-modules", "q_proj"], ["--lora-target-modules", "without --lora-rank"]),
        (["--freeze-LM", "--lr", "0", "--lora-rank", "8", "--heads-lr", "0", "--connector-lr", "0"], ["nothing would"]),
    ],
)
def test_what_is_refused(arguments: list[str], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        checked(*arguments)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("name", ["--lora-r", "--lora-enable"])
def test_llavas_names_are_known(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse_run_config([name, "8"])
    assert "did you mean --lora-rank" in capsys.readouterr().err


def test_adapters_train_beside_a_frozen_language_model_with_freeze_lm_or_without() -> None:
    """And then texts are no constants: they run in the main pass, with autograd."""
    for flags in ([], ["--freeze-LM"]):
        config = checked("--lora-rank", "8", "--connector-lr", "0", "--heads-lr", "0", *flags)
        assert config.language_model_is_frozen and not config.language_model_is_constant
        plan = pack_plan(config, 1, with_gradients=True)
        assert plan.main.texts and plan.ahead is None
    frozen = checked("--freeze-LM")
    assert frozen.language_model_is_constant and not pack_plan(frozen, 1, with_gradients=True).main.texts


def test_under_dropout_both_passes_run_the_same_rows() -> None:
    config = checked("--lora-rank", "8", "--lora-dropout", "0.05", "--global-batch-size", "4")
    plan = pack_plan(config, 4, with_gradients=True)
    assert has_dropout(config) and plan.ahead == plan.main
    assert not has_dropout(checked("--lora-rank", "8"))


def test_a_checkpoint_brings_its_own_adapters() -> None:
    none, saved = LoraFlags(), LoraFlags(lora_rank=8, lora_target_modules=["v_proj", "q_proj"], lora_dropout=0.1)
    for resumes in (True, False):
        assert settle_lora(none, saved, "iter_1", resumes=resumes) == saved
        assert settle_lora(none, none, "iter_1", resumes=resumes) == none
        same = LoraFlags(lora_rank=8, lora_alpha=16, lora_target_modules=["q_proj", "v_proj"])
        assert settle_lora(same, saved, "iter_1", resumes=resumes) == same, "the dropout may change"
        for other in (LoraFlags(lora_rank=8), LoraFlags(lora_rank=8, lora_alpha=4, lora_target_modules=["q_proj"])):
            with pytest.raises(ValueError, match=r"iter_1 has LoRA of rank 8, alpha 16, on q_proj v_proj; leave"):
                settle_lora(other, saved, "iter_1", resumes=resumes)
    assert settle_lora(saved, none, "iter_1", resumes=False) == saved
    with pytest.raises(ValueError, match=r"the run in iter_1 has no LoRA; .*--pretrained-checkpoint"):
        settle_lora(saved, none, "iter_1", resumes=True)


def test_names() -> None:
    layer = "language_model.decoder.layers.0.self_attention.linear_qkv"
    assert is_lora(f"{layer}_lora.q_proj_A") and not is_lora(f"{layer}.weight")
