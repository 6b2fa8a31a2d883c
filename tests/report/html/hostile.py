"""A finished run whose texts try to break out of the page."""

from __future__ import annotations

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq

from tpaw.storage.run_directory import RunDirectory

ATTACK = "</script><img src=x onerror=\"window.broken = 1\"><!-- \x1b[31mred\x1b[0m \u2028 &lt; 'q'"
# The verdicts of θ_0 to θ_4 on held-out prompt i % 4.
VERDICTS = ("00111", "11000", "00000", "11111")


def hostile_run(finished: RunDirectory, folder) -> RunDirectory:
    """A copy whose prompts, targets, answers and name hold `ATTACK`."""
    root = folder / "a <b> & 'run' \x1b[31m"
    shutil.copytree(finished.root, root)
    run = RunDirectory(root)
    for name in ("train", "heldout"):
        change(run.inputs / f"{name}.parquet", prompt=" prompt", target=" target")
    for i in range(5):
        file = run.evaluation(i) / "exact_match.jsonl"
        items = [json.loads(line) for line in file.read_text().splitlines()]
        for number, item in enumerate(items):
            is_right = VERDICTS[number % 4][i] == "1"
            text = f"{ATTACK} answer {i} {'x ' * (number * i)}"
            item |= {"correct": is_right, "completion": text, "finish_reason": "stop"}
        items[5]["finish_reason"] = "length"
        file.write_text("".join(json.dumps(item) + "\n" for item in items))
    for t in range(4):
        for shard in run.iteration(t).responses.glob("*.parquet"):
            change(shard, text=f" response of {t}")
    return run


def change(path, **endings):
    """Replace columns of text by `ATTACK`, an ending and the number of the row."""
    table = pq.read_table(path)
    for name, ending in endings.items():
        texts = [f"{ATTACK}{ending} {k}" for k in range(table.num_rows)]
        place = table.column_names.index(name)
        table = table.set_column(place, name, pa.array(texts, table.schema.field(name).type))
    pq.write_table(table, path)
