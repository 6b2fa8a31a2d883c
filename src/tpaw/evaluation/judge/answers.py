"""Generate a checkpoint's responses to the prompts of a file, in the format of alpaca_eval.

The responses are generated as in a run: with the same chat template, stop tokens, sampling and
shards. An interruption costs at most one shard.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpaw.config.schema import DataConfig, RunConfig
from tpaw.data.examples import Example, Prepared, described_skips, prepare_examples
from tpaw.data.token_ids import TokenIds
from tpaw.errors import InputError
from tpaw.evaluation.judge.outputs import OUTPUTS
from tpaw.generation.generator import SamplingParams
from tpaw.generation.hf import hf_opener
from tpaw.generation.responses import (
    PromptShard,
    Response,
    deliver_responses,
    generate_responses,
    read_responses,
)
from tpaw.generation.server import Servers
from tpaw.models.checks import check_model, check_vocabulary
from tpaw.models.loading import load_model, pick_device
from tpaw.models.references import Checkpoint, find_checkpoint, tokenizer_of
from tpaw.runtime.interrupt import StopSignal
from tpaw.runtime.isolation import isolated
from tpaw.runtime.progress import note
from tpaw.runtime.watch import Watch
from tpaw.scoring.score import Precision
from tpaw.storage.artifacts import is_published, own_folder, write_json
from tpaw.storage.run_directory import environment, refuse_untrusted_server

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

KEY = "evaluate.data"


def answer_rows(
    reference: str,
    data: str | None,
    output: Path | None,
    *,
    greedy: bool,
    overrides: Sequence[str],
    stop: StopSignal,
    trust: bool = False,
) -> Path:
    """Generate one response for each prompt, then write outputs.json. Resume unfinished work.

    Args:
        reference: RUN, RUN@3 or MODEL; see `models/references.py`.
        data: a file of records. The default is the held-out records of the run.
        output: folder of the responses. The default is answers/NAME.
        greedy: use greedy decoding instead of sampling.
        overrides: settings as section.key=value. They override the configuration of the run, or
            the defaults for a model.
        stop: tells whether the user asked for a stop.
        trust: whether a run may ask for `model.trust_remote_code` or for a generation server.

    Returns:
        The folder.

    Raises:
        InputError: a setting, the data or the folder cannot be used. It is raised before a model is
            loaded.
        Interrupted: the user asked for a stop; finished shards are published.
    """
    watch = Watch(stop)
    checkpoint = find_checkpoint(reference, trust=trust)
    config, source, found = _configured(checkpoint, data, overrides)
    if checkpoint.run is not None:
        refuse_untrusted_server(config.generate, checkpoint.run, trust=trust)
    tokenizer, stop_ids = tokenizer_of(checkpoint, config.model)
    with watch.progress("read and tokenize", None, "records") as on_done:
        prepared = prepare_examples(source, KEY, tokenizer, stop_ids, config.max_length, on_done)
    check_vocabulary(config.model, found, max(int(e.prompt_ids.max()) for e in prepared.examples))
    note(f"{len(prepared.examples):,} prompts; skipped: {described_skips(prepared.skipped)}")
    params = SamplingParams.of(config.generate, config.max_length, stop_ids)
    if greedy:
        params = params.greedy()
    folder = output or Path("answers") / checkpoint.name
    settings = _settings(checkpoint, config, prepared.examples, params)
    own_folder(folder, settings, data=source.path, skipped=prepared.skipped, **environment())
    responses = folder / "responses"
    if not is_published(responses):
        with isolated():
            _generate(responses, checkpoint, config, tokenizer, prepared.examples, params, watch)
    outputs = _outputs(prepared, read_responses(responses), checkpoint.name, source.path)
    write_json(folder / OUTPUTS, outputs)
    return folder


def _configured(
    checkpoint: Checkpoint, data: str | None, overrides: Sequence[str]
) -> tuple[RunConfig, DataConfig, PreTrainedConfig]:
    """Return the configuration, with the checkpoint as its model, the prompts' data, and the model.

    The model is given by its config.json.
    """
    given: dict[str, Any] = {}
    sources: list[str] = []
    if checkpoint.run is None:
        if data is None:
            raise InputError("--data: missing; give a file of records, because a model has none")
        given = {"model.path": checkpoint.player.path, "data.path": data, f"{KEY}.path": data}
    else:
        sources = [str(checkpoint.run.config_file)]
        known = checkpoint.run.load_config()
        like = known.evaluate.data or known.data
        if data is not None:
            # Read another file with the same template. Its columns may have other names.
            other = DataConfig(path=data, template=like.template, turn=like.turn)
            given = {KEY: other.model_dump()}
    first = [f"{key}={json.dumps(value)}" for key, value in given.items()]
    config = RunConfig.load(*sources, overrides=[*first, *overrides])
    if config.evaluate.data is None:
        raise InputError(
            f"--data: missing; give a file of records, because the run of {checkpoint.name} has no "
            f"held-out records ({KEY})"
        )
    # A model that stands alone may be an adapter that names its base. A run knows the base.
    player = checkpoint.player
    path = player.path if checkpoint.run is None else player.base_folder
    loaded = {key: getattr(checkpoint.model, key) for key in ("adapter", "quantization")}
    model = config.model.model_copy(update={"path": path, "revision": None, **loaded})
    config = config.model_copy(update={"model": model})
    pick_device(config.device)
    found = check_model(config.model, config.max_length)
    assert config.evaluate.data is not None
    return config, config.evaluate.data, found


def _settings(
    checkpoint: Checkpoint, config: RunConfig, examples: Sequence[Example], params: SamplingParams
) -> dict[str, Any]:
    """Return everything that decides the responses, for settings.json."""
    return {
        "name": checkpoint.name,
        "player": checkpoint.player.index if checkpoint.run else None,
        "fingerprint": checkpoint.player.fingerprint,
        "rows_sha256": hashlib.sha256("\n".join(e.id for e in examples).encode()).hexdigest(),
        "sampling": params._asdict() | {"stop_token_ids": list(params.stop_token_ids)},
        "seed": config.seed,
        "precision": config.precision,
        **({"quantization": q} if (q := config.model.quantization) is not None else {}),
        "shard_size": config.generate.shard_size,
    } | ({} if config.generate.backend == "hf" else {"backend": config.generate.backend})


def _generate(
    folder: Path,
    checkpoint: Checkpoint,
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    params: SamplingParams,
    watch: Watch,
) -> None:
    device = pick_device(config.device)
    dtype = Precision(device.type, config.precision == "bf16").dtype
    title = f"generate with {checkpoint.name}"

    def decode(ids: TokenIds) -> str:
        return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True))

    servers = Servers(watch.stop.check)
    hf = hf_opener(lambda player: load_model(player, config.model, dtype=dtype, device=device))
    open_generator = servers.open if config.generate.backend == "server" else hf
    with (
        contextlib.closing(servers),
        contextlib.ExitStack() as opened,
        watch.progress(title, len(examples), "prompts") as on_done,
    ):

        def compute(shards: Iterator[PromptShard]) -> Iterator[Path]:
            generator = None
            for shard in shards:
                generator = generator or opened.enter_context(
                    open_generator(checkpoint.player, config.generate)
                )
                yield deliver_responses(folder, shard, generator, params, decode, on_done)

        generate_responses(
            folder,
            checkpoint.player,
            examples,
            compute,
            params,
            shard_size=config.generate.shard_size,
            seed=config.seed,
            on_done=on_done,
        )


def _outputs(
    prepared: Prepared, responses: Sequence[Response], generator: str, data: str
) -> list[dict[str, Any]]:
    entries = zip(prepared.examples, prepared.instructions, responses, strict=True)
    return [
        {
            "instruction": instruction,
            "output": response.text,
            "generator": generator,
            "dataset": Path(data).stem,
            "id": example.id,
            "prompt": example.prompt_text,
            "finish_reason": response.finish_reason,
        }
        for example, instruction, response in entries
    ]
