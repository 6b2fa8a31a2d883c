"""Greedy answers to the starter's held-out problems: the harness's own loop, and our generator.

    python benchmarks/exact_match.py [--items 240] [--batch 1 16 64]

All contenders answer the same requests of the task `starter` through lm-evaluation-harness: its
`HFLM`, a fixed number of rows at a time, and `HarnessModel`. Prompts, stop strings, filters and
verdicts are the harness's in all. Contenders must agree on every verdict, or nothing is printed:
the weights are fp32, where rounding changes no token of these answers.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import interleaved, parse, parser, print_table, ratios, spread, write_json
from lm_eval.models.huggingface import HFLM

from tpaw.config.schema import GenerateConfig, RunConfig
from tpaw.evaluation.benchmarks.harness import HarnessModel, load_tasks
from tpaw.evaluation.benchmarks.suite import load_suite
from tpaw.models.loading import load_model
from tpaw.models.references import find_checkpoint
from tpaw.models.tokenizers import load_tokenizer, stop_token_ids

MODEL = "tpaw://starter/model"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; `--size`, `--bf16` and `--seed` have no meaning here."""
    options_of = parser(__doc__)
    options_of.add_argument("--items", type=int, default=240)
    options_of.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    options = parse(options_of, argv)
    checkpoint = find_checkpoint(MODEL)
    tokenizer = load_tokenizer(checkpoint.model)
    device = torch.device(options.device)
    generate: GenerateConfig = RunConfig.load("starter").generate
    (loaded,) = load_tasks(load_suite("starter"))
    task = loaded.task

    def model() -> Any:
        return load_model(checkpoint.player, checkpoint.model, dtype=torch.float32, device=device)

    def stock(batch: int) -> Any:
        return HFLM(pretrained=model(), tokenizer=tokenizer, batch_size=batch)

    ours = HarnessModel(
        model(),
        tokenizer,
        stop_ids=stop_token_ids(checkpoint.model, tokenizer),
        tokens_per_row=8192,
        tokens_per_batch=generate.tokens_per_batch,
    )
    models = {f"harness, {n} at a time": stock(n) for n in options.batch} | {"tpaw": ours}
    verdicts: dict[str, list[bool]] = {}

    def contender(name: str) -> Callable[[int], float]:
        def run(items: int) -> float:
            task.build_all_requests(
                limit=items,
                apply_chat_template=True,
                fewshot_as_multiturn=True,
                chat_template=ours.apply_chat_template,
            )
            started = time.perf_counter()
            texts = models[name].generate_until(task.instances, disable_tqdm=True)
            seconds = time.perf_counter() - started
            verdicts[name] = [
                bool(outcome["exact_match"]) for outcome in judged(task, texts, "strict-match")
            ]
            return seconds

        return run

    seconds = interleaved(
        {name: contender(name) for name in models},
        options.items,
        warm_up=min(8, options.items),
        repeats=options.repeats,
    )
    if any(found != verdicts["tpaw"] for found in verdicts.values()):
        print("the contenders' verdicts differ", file=sys.stderr)
        return 1
    correct = sum(verdicts["tpaw"])
    rows = [
        [
            name,
            spread([options.items / s for s in taken]).text(1),
            ratios(taken, seconds["tpaw"]).text(2),
        ]
        for name, taken in seconds.items()
    ]
    print_table(
        f"starter model, {device}, fp32: {options.items} problems, {correct} right by every "
        "contender; median [range]",
        ["", "items a second", "time, times tpaw's"],
        rows,
    )
    write_json(options, {"seconds": seconds, "items": options.items, "correct": correct})
    return 0


def judged(task: Any, texts: Sequence[str], name: str) -> list[dict[str, Any]]:
    """The harness's verdict on each answer, by its own filter and metric."""
    for instance, text in zip(task.instances, texts, strict=True):
        instance.resps = [text]
    task.apply_filters()
    return [task.process_results(i.doc, [i.filtered_resps[name]]) for i in task.instances]


if __name__ == "__main__":
    sys.exit(main())
