"""Everything that can be refused is refused here, before anything is written or loaded."""

from __future__ import annotations

from collections.abc import Callable

from tpaw.config.schema import RunConfig
from tpaw.data.examples import Prepared, prepare_examples
from tpaw.data.inputs import Inputs
from tpaw.errors import InputError
from tpaw.evaluation.exact_match import has_answers
from tpaw.models.checks import check_model
from tpaw.models.loading import pick_device
from tpaw.models.tokenizers import load_tokenizer, stop_token_ids
from tpaw.training.arguments import check_training

OnDone = Callable[[int], None]


def read_inputs(config: RunConfig, on_done: OnDone = lambda count: None) -> Inputs:
    """Check the model's kind, then read, template and tokenise the data.

    Args:
        on_done: called with the number of rows read since the last call.

    Raises:
        InputError: naming the setting, the file or the row.
    """
    pick_device(config.device)
    check_training(config)
    model_config = check_model(config)
    tokenizer = load_tokenizer(config.model)
    stop_ids = stop_token_ids(config.model, tokenizer)
    tokenizer.eos_token_id = stop_ids[0]

    def prepare(key: str) -> Prepared:
        data = config.data if key == "data" else config.evaluate.data
        if data is None:
            return Prepared([], {})
        preferences = config.method == "dpo" and key == "data"
        return prepare_examples(
            data, key, tokenizer, stop_ids, config.max_length, on_done, preferences=preferences
        )

    train, heldout = prepare("data"), prepare("evaluate.data")
    used = max(
        int(ids.max())
        for example in train.examples + heldout.examples
        for ids in (example.prompt_ids, example.target_ids, example.rejected_ids)
        if ids is not None
    )
    if used >= (vocab_size := model_config.get_text_config().vocab_size):
        raise InputError(
            f"model.path: {config.model.path}: the tokenizer gives token id {used}, the model has "
            f"{vocab_size} tokens; they do not belong together"
        )
    if config.evaluate.exact_match and not heldout.examples:
        raise InputError("evaluate.exact_match: it needs held-out rows; set evaluate.data")
    if config.evaluate.exact_match and not has_answers(heldout.examples):
        raise InputError("evaluate.exact_match: some held-out target has no `#### answer`")
    skipped = {"data": train.skipped, "evaluate.data": heldout.skipped}
    return Inputs(train.examples, heldout.examples, skipped, tokenizer, stop_ids)
