"""The reference's scores at a run's start: the file that is given, the one that the run keeps, or made now."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from hacl_megatron.assemble.forward import ForwardOnly
from hacl_megatron.assemble.run import Run
from hacl_megatron.checkpoint.run.folder import find_checkpoint
from hacl_megatron.config.connectors import connector_file
from hacl_megatron.config.run import RunConfig
from hacl_megatron.data.images import resolve_backend
from hacl_megatron.data.loader import StepLoader
from hacl_megatron.data.manifest import Manifest
from hacl_megatron.data.tokenizer import Tokenizer
from hacl_megatron.evaluation.model_files import fingerprint
from hacl_megatron.evaluation.scores import file_digest
from hacl_megatron.training.reference.scores import ReferenceScores
from hacl_megatron.training.reference.scoring import ScoredTwins, samples_with_twins

SCORES_FILE = "reference_scores.safetensors"
"""In --save."""
VALIDATION_FILE = "reference_scores_of_validation.safetensors"
_WEIGHTS = "weights of "
"""What the names of an identity's facts about the model begin with."""


@dataclass(frozen=True, kw_only=True)
class References:
    """On ranks that read data; None for what has no reference."""

    training: ReferenceScores | None = None
    validation: ReferenceScores | None = None


@dataclass(frozen=True, kw_only=True)
class ReferenceRequest:
    """What is needed to find scores or make them; every rank has one.

    Args of `open_loader`: sample ids, whether they are the validation data's.
    """

    run: Run
    forward: ForwardOnly
    tokenizer: Tokenizer | None
    """On ranks that read data."""
    open_loader: Callable[[list[int], bool], StepLoader]
    resume_from: Path | None
    beat: Callable[[], None] = lambda: None
    why_stop: Callable[[], str | None] = lambda: None


def references_of(request: ReferenceRequest) -> tuple[References, list[str]]:
    """The scores of what the run trains and validates on, on every rank, and lines to say; every rank calls it.

    Raises:
        ValueError: on every rank; a file is of something else, or a resumed run's scores are gone.
        StoppedEarly: on every rank; `request.why_stop` gave a reason while scores were made.
    """
    config = request.run.config
    training, lines = _found_or_made(request, for_validation=False)
    validation = None
    if config.data.valid_data_path and config.training.eval_interval:
        validation, more = _found_or_made(request, for_validation=True)
        lines += more
    return References(training=training, validation=validation), lines


def make_scores(request: ReferenceRequest, path: Path) -> list[str]:
    """Score the training data's twins into `path`; lines to say, on rank 0.

    Raises:
        ValueError: on every rank; `path` is something else.
    """
    identity: dict[str, str] = {}
    box: list[str | None] = [None, None]  # what is said, what is wrong
    if dist.get_rank() == 0:
        identity = identity_of(request.run.config, request.tokenizer, for_validation=False)
        try:
            if path.exists():
                if (difference := ReferenceScores.read(path).difference(identity)) is not None:
                    raise ValueError(f"{path} holds other scores: {difference}; name another file, or remove it")
                box = [f"{path} has these scores already", None]
        except ValueError as error:
            box = [None, f"--output {error}"]
    dist.broadcast_object_list(box, src=0)
    said, mistake = box
    if mistake is not None:
        raise ValueError(mistake)
    return [said] if said is not None else _made(request, identity, path, for_validation=False)[1]


def _found_or_made(request: ReferenceRequest, *, for_validation: bool) -> tuple[ReferenceScores, list[str]]:
    config, resumes = request.run.config, request.resume_from is not None
    name = VALIDATION_FILE if for_validation else SCORES_FILE
    save = None if config.checkpoint.save is None else Path(config.checkpoint.save) / name
    identity: dict[str, str] = {}
    scores, lines, mistake = None, [], None
    if dist.get_rank() == 0:
        identity = identity_of(config, request.tokenizer, for_validation=for_validation)
        try:
            scores, lines = _found(config, identity, name, resumes=resumes)
        except ValueError as error:
            mistake = str(error)
    box = [scores, mistake]
    dist.broadcast_object_list(box, src=0)
    scores, mistake = box
    if mistake is not None:
        raise ValueError(mistake)
    if scores is not None:
        return scores, lines
    made, more = _made(request, identity, save, for_validation=for_validation)
    box = [made]
    dist.broadcast_object_list(box, src=0)
    return box[0], [*lines, *more]


def _found(
    config: RunConfig, identity: dict[str, str], name: str, *, resumes: bool
) -> tuple[ReferenceScores | None, list[str]]:
    """On rank 0: scores that are there already; None where they are to be made."""
    checkpoint = config.checkpoint
    folders = [Path(folder) for folder in (checkpoint.save, checkpoint.load if resumes else None) if folder is not None]
    kept = next((folder / name for folder in folders if (folder / name).is_file()), None)
    given = config.preference.reference_scores if name == SCORES_FILE else None
    if resumes:  # the weights that the run started from may be gone
        identity = {fact: value for fact, value in identity.items() if not fact.startswith(_WEIGHTS)}
    if given is not None:
        scores = ReferenceScores.read(Path(given))
        if (difference := scores.difference(identity)) is not None:
            raise ValueError(
                f"--reference-scores {given} is of something else: {difference}; make it again with "
                "tools/score_reference.py and this run's flags, or leave the flag out"
            )
        if resumes and kept is not None and not scores.same_numbers(ReferenceScores.read(kept)):
            raise ValueError(
                f"--reference-scores {given} is not what the run was begun with, {kept}; leave the flag out"
            )
        if checkpoint.save is not None and not resumes:
            scores.write(Path(checkpoint.save) / name)
        return scores, [f"reference: {_told(scores)}, from {given}"]
    if kept is not None:
        scores = ReferenceScores.read(kept)
        if (difference := scores.difference(identity)) is None:
            return scores, [f"reference: {_told(scores)}, from {kept}"]
        if resumes:
            raise ValueError(
                f"{kept} is of something else: {difference}; resume with the data and flags that the run was begun with"
            )
        return None, [f"reference: {kept} is of something else ({difference}), so it is made again"]
    if resumes:
        raise ValueError(
            f"the run that is resumed has no {name} in {' or '.join(map(str, folders))}, and the weights that it "
            "started from are not its checkpoint's; make the scores with tools/score_reference.py and give them by "
            "--reference-scores"
        )
    return None, []


def _made(
    request: ReferenceRequest, identity: dict[str, str], path: Path | None, *, for_validation: bool
) -> tuple[ReferenceScores | None, list[str]]:
    """Scores of the weights in the model, on rank 0, in `path` too; elsewhere None."""
    config = request.run.config
    sample_ids: list[int] = []
    if dist.get_rank() == 0:
        sample_ids = samples_with_twins(config, for_validation=for_validation)
        if for_validation:
            seen = config.training.eval_iters * request.run.layout.global_batch_size
            sample_ids = [sample_id for sample_id in sample_ids if sample_id < seen]
    pass_ = ScoredTwins(
        request.run,
        request.forward,
        lambda ids: request.open_loader(ids, for_validation),
        request.beat,
        request.why_stop,
    )
    scores = pass_.run(sample_ids, identity, path=path)
    if scores is None:
        return None, []
    which = "of the validation data " if for_validation else ""
    lines = [f"reference: {_told(scores)} {which}scored by the weights that the run starts from"]
    if path is not None:
        lines[0] += f", kept in {path}"
    if pass_.unusable:
        first = pass_.unusable[0]
        lines.append(
            f"reference: {len(pass_.unusable)} samples could not be scored, their twins will not be compared (first: "
            f"{first.name}: {first.reason})"
        )
    return scores, lines


def _told(scores: ReferenceScores) -> str:
    return f"{len(scores.likelihoods)} twins of {len(scores.sample_ids)} samples"


def identity_of(config: RunConfig, tokenizer: Tokenizer, *, for_validation: bool) -> dict[str, str]:
    """Name -> value of all that decides the scores but the layout, which changes nothing but rounding."""
    data, model = config.data, config.model
    names = ("valid_data_path",) if for_validation else ("data_path", "contrastive_data_path")
    facts = {}
    for name in names:
        manifest = Manifest.read(getattr(data, name), version=data.version, cache_dir=data.data_cache_dir)
        facts[f"content of --{name.replace('_', '-')}"] = manifest.digest
    if for_validation:
        facts["--eval-iters"] = str(config.training.eval_iters)
    digest = hashlib.blake2b(digest_size=8)
    for file, content in sorted(tokenizer.files.items()):
        digest.update(f"{file}\0{len(content)}\0".encode() + content)
    facts |= {
        "content of the tokenizer": digest.hexdigest(),
        "--preference-loss": config.preference.preference_loss,
        "--version": data.version,
        "--model-max-length": str(data.model_max_length),
        "--image-aspect-ratio": data.image_aspect_ratio,
        "--image-transparency": data.image_transparency,
        "--image-orientation": data.image_orientation,
        "image back end": resolve_backend(data.image_backend),
        "precision": "bfloat16" if model.bf16 else "float32",
    }
    if config.architecture.tiles is not None:  # scores of other models are as they were before there were tiles
        facts["tiles of pictures"] = str(config.architecture.tiles)
    if model.image_grid_pinpoints is not None:  # over a model without tiles the newline is drawn
        facts[f"{_WEIGHTS}a fresh newline: --seed"] = str(config.training.seed)
    for name in ("pretrained_checkpoint", "vision_tower"):
        if (given := getattr(model, name)) is not None:
            folder = Path(given)
            facts[f"{_WEIGHTS}--{name.replace('_', '-')}"] = (
                fingerprint(find_checkpoint(folder) or folder) if folder.is_dir() else "gone"
            )
    if model.pretrain_mm_mlp_adapter is not None:
        file = connector_file(Path(model.pretrain_mm_mlp_adapter))
        facts[f"{_WEIGHTS}--pretrain-mm-mlp-adapter"] = file_digest(file) if file.is_file() else "gone"
    elif model.pretrained_checkpoint is None or model.vision_tower is not None:
        facts[f"{_WEIGHTS}a fresh model: --seed"] = str(config.training.seed)
    return facts
