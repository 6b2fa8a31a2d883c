"""Studies: which runs there are, what they share, what is made of their results."""

from __future__ import annotations

import itertools
import json
import math
import random
import xml.etree.ElementTree as ElementTree

import pytest
import yaml
from messages import refused, says

from tpaw.config.schema import RunConfig
from tpaw.report.figures import draw_figures, spread
from tpaw.report.html.study import write_study_page
from tpaw.report.study import sentences, study_report, study_tables
from tpaw.runtime.interrupt import StopSignal
from tpaw.selfplay import self_play
from tpaw.storage.artifacts import describe_file, verify, write_json, write_manifest
from tpaw.storage.run_directory import RunDirectory, open_run
from tpaw.study.analysis import analyse
from tpaw.study.config import read_study
from tpaw.study.results import _curve, _measures
from tpaw.study.runner import run_study, runs_of
from tpaw.study.sharing import begin_run, begin_shared, is_prepared, prepare_shared, shared_name


@pytest.fixture
def write(tmp_path, settings):
    """Writes a study over a recipe of tiny models, and returns its path."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))

    def write(**study):
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({"recipe": "recipe.yaml"} | study))
        return str(path)

    return write


def test_every_combination_of_methods_and_settings(write):
    study, conditions = read_study(
        write(
            methods=["tpaw", "spin"],
            vary={
                "objective.eta": [1, 6.0],
                "team.opponents.last, team.main_players.last": [1, 2],
            },
            set={"iterations": 2},
            seeds=[3, 5],
        )
    )
    assert study.seeds == (3, 5)
    assert len(conditions) == 8
    found = {c.name: c.config(5) for c in conditions}
    assert list(found)[:2] == ["tpaw, eta = 1, team.last = 1", "spin, eta = 1, team.last = 1"]
    config = found["spin, eta = 6.0, team.last = 2"]
    assert (config.seed, config.iterations, config.objective.eta) == (5, 2, 6.0)
    assert config.team.opponents.last == config.team.main_players.last == 2
    assert config.objective.target_weight == "one"
    assert len({c.folder for c in conditions}) == 8
    assert all(set(c.folder) <= set("abcdefghijklmnopqrstuvwxyz0123456789.=-") for c in conditions)


def test_methods_may_have_names_recipes_and_settings_of_their_own(write):
    methods = {"SPIN, slow": ["spin", {"train": {"learning_rate": 1e-5}}], "plain": "tpaw"}
    study, [slow, plain] = read_study(write(methods=methods, set={"train": {"warmup": 0.25}}))
    assert slow.config(0).train.warmup == plain.config(0).train.warmup == 0.25
    assert study.seeds == (0, 1, 2, 3, 4, 5)
    assert slow.config(0).train.learning_rate == 1e-5
    assert slow.config(0).team.main_players.last == 1
    assert plain.config(0).train.learning_rate == 1e-3


@pytest.mark.parametrize(
    "recipe", ["gsm8k-qwen2.5-1.5b", "ultrachat-qwen2.5-1.5b", "ultrachat-llama-3.1-8b"]
)
def test_a_study_takes_the_recipes_of_the_paper(write, recipe):
    _, conditions = read_study(write(recipe=recipe, methods=["tpaw", "spin", "sft_continue"]))
    assert len(conditions) == 3


@pytest.mark.parametrize(
    ("study", "parts"),
    [
        pytest.param(study, parts, id=name)
        for name, study, *parts in [
            ("recipe", {"methods": ["tpa"]}, "tpa", "tpaw"),
            ("key", {"method": ["tpaw"]}, "method", "methods"),
            ("list of mappings", {"methods": [{"tpaw": "tpaw"}]}, "methods"),
            ("setting", {"vary": {"objective.etaa": [1]}}, "objective.etaa", "objective.eta"),
            ("no value", {"vary": {"objective.eta": []}}, "vary.objective.eta"),
            ("many seeds", {"seeds": 99999999999}, "10000"),
            ("many runs", {"vary": {f"x{i}": list(range(10)) for i in range(9)}}, "10000"),
            ("bad value", {"vary": {"objective.eta": [0.5]}}, "eta = 0.5", "objective.eta"),
            ("no list", {"vary": {"objective.eta": 3}}, "vary", 3),
            ("seeds twice", {"seeds": [1, 1]}, "seeds", "[1, 1]"),
            ("no seeds", {"seeds": 0}, "seeds"),
            ("baseline", {"baseline": "spi"}, "baseline", "'spi'", "spin"),
            ("no evaluation", {"set": {"evaluate": None}}, "evaluate"),
            ("no rows", {"set": {"evaluate": {"data": None}}}, "tpaw", "evaluate.data"),
            ("one folder", {"methods": {"a b": "tpaw", "a-b": "spin"}}, "a-b"),
        ]
    ],
)
def test_bad_studies(write, study, parts):
    with refused(*parts):
        read_study(write(**({"methods": ["tpaw", "spin"]} | study)))


def test_an_unknown_study():
    with refused("study", "'method'"):
        read_study("method")


def checkpoints(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*.safetensors")
        if "players" not in path.parts
    }


def test_a_run_with_links_is_a_run_without(tmp_path, settings):
    settings["iterations"] = 2
    config = RunConfig.load(settings)
    shared = tmp_path / "shared"
    begin_shared(config, shared)
    assert not is_prepared(shared)
    prepare_shared(shared, StopSignal())
    assert is_prepared(shared)
    began = {p: p.read_bytes() for p in shared.rglob("*") if p.is_file()}

    begin_run(config, tmp_path / "linked", shared, "linked")
    self_play(config, tmp_path / "linked")
    self_play(config, tmp_path / "alone")
    assert checkpoints(tmp_path / "linked") == checkpoints(tmp_path / "alone")
    assert len(checkpoints(tmp_path / "linked")) == 2

    # Shared files have two names, and were not written to.
    shard = "iterations/1/responses/shard-00000.parquet"
    assert (shared / shard).samefile(tmp_path / "linked" / shard)
    assert {p: p.read_bytes() for p in shared.rglob("*") if p.is_file()} == began
    for manifest in RunDirectory(shared).manifests(2):
        verify(manifest)
    begin_run(config, tmp_path / "linked", shared, "linked")  # trains already: left alone


def test_a_method_that_keeps_right_responses_prepares_all_for_those_that_share(tmp_path, settings):
    settings["iterations"] = 1
    config, shared = RunConfig.load(settings), tmp_path / "shared"
    picky = RunConfig.load(settings, "self_training")
    assert shared_name(picky) == shared_name(config)
    begin_shared(picky, shared)
    prepare_shared(shared, StopSignal())
    begin_run(config, tmp_path / "linked", shared, "linked")
    self_play(config, tmp_path / "alone")
    linked, alone = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "logprobs").rglob("*.parquet")}
        for name in ("linked", "alone")
    )
    assert linked == alone
    assert linked


def test_a_finished_run_of_other_settings_is_not_taken_for_one_of_the_study(write, tmp_path):
    study, conditions = read_study(write(set={"iterations": 1}, seeds=[0]))
    [run] = runs_of(conditions, study.seeds, tmp_path / "study")
    with open_run(run.folder, run.config) as directory:
        write_json(directory.summary_file, {"iterations_done": 1})
    assert run_study([run], tmp_path / "study", 1, StopSignal()) == {}

    study, conditions = read_study(
        write(set={"iterations": 1, "objective": {"eta": 2.0}}, seeds=[0])
    )
    changed = runs_of(conditions, study.seeds, tmp_path / "study")
    with refused("objective.eta: 6.0", "2.0"):
        run_study(changed, tmp_path / "study", 1, StopSignal())


class Done:
    """A process that has ended."""

    def poll(self):
        return 0


def test_every_run_has_the_name_of_its_condition_and_seed(write, tmp_path):
    study, conditions = read_study(write(vary={"objective.eta": [1.0, 2.0]}, seeds=[3, 5]))
    runs = runs_of(conditions, study.seeds, tmp_path / "study")
    run_study(runs, tmp_path / "study", 1, StopSignal(), lambda *_, log, threads: Done())
    assert {RunDirectory(run.folder).name() for run in runs} == {
        "tpaw, eta = 1.0, seed 3", "tpaw, eta = 2.0, seed 3",
        "tpaw, eta = 1.0, seed 5", "tpaw, eta = 2.0, seed 5",
    }  # fmt: skip


def test_who_shares(settings):
    def name(**changes):
        return shared_name(RunConfig.load(settings | changes))

    same = name()
    assert name(objective={"eta": 2.0}) == same
    assert name(team={"opponents": {"last": 1}}) == same
    assert name(iterations=1) == same
    assert name(train=settings["train"] | {"learning_rate": 1e-4}) == same
    assert name(seed=1) != same
    assert name(max_length=64) != same
    assert name(generate=settings["generate"] | {"temperature": 0.7}) != same


def results_of(finals, starts=0.5):
    """Two iterations: the same start, then what is given."""
    return {
        seed: {
            "iterations": [{"accuracy": starts, "gap": 0.0}, {"accuracy": final, "gap": 1.0}],
            "curve": [[1, 0.0], [2, final]],
            "seconds": 1.0,
        }
        for seed, final in enumerate(finals)
    }


@pytest.fixture
def analysed(write):
    def analysed(finals, baseline=None):
        _, conditions = read_study(write(methods=dict.fromkeys(finals, "tpaw")))
        results = {name: results_of(values) for name, values in finals.items()}
        return analyse(conditions, results, baseline)

    return analysed


def test_a_known_shift_is_found_and_identical_runs_are_identical(analysed):
    base = [0.50, 0.51, 0.52, 0.53, 0.54, 0.55]
    shift = [0.10, 0.12, 0.11, 0.10, 0.12, 0.11]
    shifted = [b + s for b, s in zip(base, shift, strict=True)]
    found = analysed({"base": base, "same": base, "better": shifted})
    assert found["primary"] == "accuracy"
    same, better = found["comparisons"]
    assert (same["difference"], same["t_p_value"], same["sign_flip_p_value"]) == (0, 1, 1)
    assert same["g_z"] == 0
    assert better["difference"] == pytest.approx(0.11)
    # All six of one sign: two patterns of 64. Holm doubles the smaller of two.
    assert better["sign_flip_p_value"] == pytest.approx(2 / 64)
    assert better["sign_flip_p_value_holm"] == pytest.approx(4 / 64)
    # d_z = .11 / SD, SD² = (4 · .01²) / 5; J(5) = 1 − 3 / (4 · 5 − 1) to three digits.
    assert better["g_z"] == pytest.approx(0.11 / math.sqrt(4e-4 / 5) * (1 - 3 / 19), rel=2e-3)
    mean = found["conditions"]["better"]["by_iteration"][1]["accuracy"]["mean"]
    assert mean == pytest.approx(sum(shifted) / 6)


def test_only_seeds_that_both_have_are_compared(analysed):
    found = analysed({"base": [0.5, 0.6, 0.7], "other": [0.6, 0.7]}, baseline="base")
    [other] = found["comparisons"]
    assert other["seeds"] == [0, 1]
    assert other["difference"] == pytest.approx(0.1)
    says(other["caution"], 2)


def complete(analysis, failures=()):
    machine = {"processor": "P", "cores": 2, "versions": {"tpaw": "0"}, "python": "3"}
    facts = {"name": "n", "command": "c", "seeds": [0, 1], "jobs": 1, "machine": machine}
    facts["evaluated_on"] = ["rows.jsonl"]
    return facts | {"failures": dict(failures)} | analysis


def test_one_seed_gives_numbers_and_a_sentence(analysed):
    study = complete(analysed({"base": [0.5], "other": [0.6]}))
    text = study_report(study, [])
    says("\n".join(sentences(study)), 1)
    assert all(sentence in text for sentence in sentences(study))
    assert "| other | 1 | +0.100 | – | – | – | 1 | 1 |" in text
    assert study_tables(study)


def test_failed_runs_are_named(analysed):
    failures = {"other, seed 1": "tpaw: step 3: it broke"}
    study = complete(analysed({"base": [0.5, 0.6], "other": [0.6]}), failures)
    says("\n".join(sentences(study)), "other, seed 1: tpaw: step 3: it broke")


def test_a_condition_whose_every_run_failed_has_no_numbers(analysed, tmp_path):
    study = complete(analysed({"base": [0.5, 0.6], "other": []}))
    assert study["comparisons"] == []
    assert "| other | 0 | – | – |" in study_report(study, [])
    draw_figures(study, tmp_path)


def test_a_study_whose_every_run_failed_says_why_and_shows_no_empty_table(analysed, tmp_path):
    study = complete(analysed({"base": [], "other": []}), {"base, seed 0": "tpaw: it broke"})
    figures = draw_figures(study, tmp_path / "figures")
    report = study_report(study, figures)
    assert (study_tables(study), figures) == ([], [])
    assert "- failed and left out: base, seed 0: tpaw: it broke" in report
    assert "|" not in report
    write_study_page(tmp_path / "page.html", study | {"study": {}})
    assert "No run of this study has ended." in (tmp_path / "page.html").read_text()


def test_a_varied_condition_whose_every_run_failed_is_left_out_of_the_figure(write, tmp_path):
    _, conditions = read_study(write(vary={"objective.eta": [1.0, 2.0]}))
    results = {conditions[0].name: results_of([0.5, 0.6]), conditions[1].name: {}}
    drawn = draw_figures(complete(analyse(conditions, results, None)), tmp_path)
    assert [p.stem for p in drawn] == ["accuracy-by-objective-eta", "gap-by-objective-eta"]


def test_without_held_out_records_the_first_suite_is_compared(write, tmp_path):
    _, conditions = read_study(write(methods={"a": "tpaw", "b": "tpaw"}))
    results = {
        name: {
            seed: {"iterations": [{"v1": 50.0, "v1: ARC": score}], "curve": [], "seconds": 1.0}
            for seed in (0, 1)
        }
        for name, score in (("a", 40.0), ("b", 41.5))
    }
    study = complete(analyse(conditions, results, None))
    assert (study["primary"], study["measures"]) == ("v1", ["v1", "v1: ARC"])
    drawn = draw_figures(study, tmp_path)
    assert [path.stem for path in drawn] == ["v1-by-iteration"]
    text = study_report(study, drawn)
    assert "**v1: ARC, %: mean over seeds ± SD [95 % t-interval]**" in text
    assert "| b | 2 | 41.500 ± 0.000 [41.500, 41.500] |" in text


def test_a_run_is_done_once_every_checkpoint_has_every_suite(write, tmp_path):
    names = ["gsm8k", "starter"]
    _, conditions = read_study(write(set={"iterations": 1, "evaluate": {"suites": names}}))
    [run] = runs_of(conditions, [0], tmp_path)
    directory = RunDirectory(run.folder)
    folders = [directory.suite(i, name) for i in (0, 1) for name in names]
    for folder in folders:
        folder.mkdir(parents=True)
        write_manifest(folder, {})
    write_json(directory.summary_file, {"iterations_done": 1})
    assert run.is_done()
    for folder in folders:
        away = folder.rename(tmp_path / "away")
        assert not run.is_done()
        away.rename(folder)
    assert run.is_done()


def test_a_curve_has_no_point_that_is_the_mean_of_fewer_steps(write, tmp_path):
    _, conditions = read_study(write(set={"train": {"log_every": 4}}, seeds=[0]))
    [run] = runs_of(conditions, [0], tmp_path)
    log = RunDirectory(run.folder).training_log(run.config.iterations)
    log.parent.mkdir(parents=True)
    steps = [(4, -1.0), (8, -2.0), (9, 5.0)]
    log.write_text("".join(json.dumps({"step": s, "rewards/target": r}) + "\n" for s, r in steps))
    checkpoint = RunDirectory(run.folder).checkpoint(run.config.iterations)
    checkpoint.mkdir()
    entry = describe_file(log.parent, log)
    write_manifest(checkpoint, {"training_log": entry})
    assert list(_curve(run)) == [[4, -1.0], [8, -2.0]]
    log.write_text(log.read_text().replace("-1.0", "-1.5"))
    assert list(_curve(run)) == []  # edited: a wrong curve is worse than none


def test_figures_name_every_condition_and_are_the_same_each_time(analysed, tmp_path):
    study = complete(analysed({"first way": [0.5, 0.6], "second way": [0.7, 0.8]}))
    drawn = draw_figures(study, tmp_path / "a")
    names = ["accuracy-by-iteration", "gap-by-iteration", "target-reward-by-step"]
    assert [path.stem for path in drawn] == names
    for path in drawn:
        text = "".join(ElementTree.parse(path).getroot().itertext())
        assert "first way" in text
        assert "second way" in text
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    again = draw_figures(study, tmp_path / "b")
    assert [p.read_bytes() for p in drawn] == [p.read_bytes() for p in again]


def test_the_second_round_of_the_colours_is_dashed(analysed, tmp_path):
    study = complete(analysed({f"way {i}": [0.5, 0.6] for i in range(9)}))
    [accuracy, *_] = draw_figures(study, tmp_path)
    lines = [
        line
        for line in accuracy.read_text().splitlines()
        if "stroke: #0072b2" in line.lower() and "fill: none" in line
    ]
    assert any("stroke-dasharray" in line for line in lines)
    assert any("stroke-dasharray" not in line for line in lines)


def test_one_setting_that_varies_is_the_axis(write, tmp_path):
    _, conditions = read_study(write(vary={"objective.eta": [1.0, 2.0, 4.0]}))
    results = {c.name: results_of([0.5 + c.settings["objective.eta"] / 100]) for c in conditions}
    drawn = draw_figures(complete(analyse(conditions, results, None)), tmp_path)
    assert [p.stem for p in drawn] == ["accuracy-by-objective-eta", "gap-by-objective-eta"]
    assert "objective.eta" in drawn[0].read_text()


def test_conditions_of_different_lengths_show_their_first_and_last_checkpoint(analysed, tmp_path):
    analysis = analysed({"two": [0.5, 0.6], "one": [0.7, 0.8]})
    longer = analysis["conditions"]["two"]["by_iteration"]
    longer.insert(1, longer[0])
    study = complete(analysis)
    text = study_report(study, draw_figures(study, tmp_path))
    assert "| condition | seeds | θ_0 | last θ |" in text
    [row] = [line for line in text.splitlines() if line.startswith("| one | 2 | 0.500 ±")]
    assert row.count("|") == 5
    assert "0.750 ±" in row
    drawn = "".join(ElementTree.parse(tmp_path / "accuracy-by-iteration.svg").getroot().itertext())
    assert "share of the iterations" in drawn
    [line] = [line for line in text.splitlines() if line.startswith("| two | 0 |")]
    assert line.count("|") == 6  # every iteration of every run has a column


def test_what_a_method_keeps_is_a_measure():
    critic = {"auc": {"value": 0.6}, "right_share_heldout": 0.5, "best_right_share_heldout": 0.7}
    assert dict(_measures({"iteration": 1, "critic": critic})) == {
        "critic_auc": 0.6, "right_responses": 0.5, "right_kept": 0.7,
    }  # fmt: skip
    unknown = {"auc": {"value": None}, "right_share_heldout": 0.5, "best_right_share_heldout": None}
    assert dict(_measures({"iteration": 1, "critic": unknown})) == {"right_responses": 0.5}
    kept = {"triples": 3, "responses": 12, "right_share_of_all": 0.25, "right_share": 0.5}
    assert dict(_measures({"iteration": 1, "kept": kept})) == {
        "right_responses": 0.25, "right_kept": 0.5,
    }  # fmt: skip
    assert dict(_measures({"iteration": 0})) == {}


def test_sampled_accuracies_are_measures_with_a_figure(analysed, tmp_path):
    analysis = analysed({"one": [0.7, 0.8]})
    name = "accuracy at T = 0.5"
    for entry, mean in zip(analysis["conditions"]["one"]["by_iteration"], (0.4, 0.6), strict=True):
        entry[name] = entry["accuracy"] | {"mean": mean}
    analysis["measures"] += [name]
    study = complete(analysis)
    assert f"**{name}: mean over seeds" in study_report(study, [])
    drawn = draw_figures(study, tmp_path)
    assert drawn[-1].stem == "accuracy-by-temperature"
    text = "".join(ElementTree.parse(drawn[-1]).getroot().itertext())
    assert "the SFT model" in text
    assert "temperature (0: greedy)" in text


def test_a_number_for_every_iteration_is_named_and_drawn_by_its_first(write, tmp_path):
    rates = [[1e-4, 5e-5], [1e-2, 5e-3]]
    _, conditions = read_study(write(vary={"train.learning_rate": rates}, set={"iterations": 2}))
    assert [c.name for c in conditions] == [
        "tpaw, learning_rate = 0.0001 5e-05",
        "tpaw, learning_rate = 0.01 0.005",
    ]
    results = {c.name: results_of([0.5]) for c in conditions}
    [accuracy, _] = draw_figures(complete(analyse(conditions, results, None)), tmp_path)
    text = "".join("".join(ElementTree.parse(accuracy).getroot().itertext()).split())
    assert "10\u22124" in text  # a logarithmic axis
    assert "10\u22122" in text


def test_names_at_the_ends_of_lines_have_room_and_move_little():
    """Against scipy's solution of the same least-squares problem."""
    from scipy.optimize import minimize

    rng = random.Random(0)
    for _ in range(20):
        values = sorted(rng.uniform(0, 1) for _ in range(rng.randint(1, 7)))
        places = spread(values, 0.1, -10, 10)
        assert all(b - a >= 0.1 - 1e-9 for a, b in itertools.pairwise(places))
        best = minimize(
            lambda p, values=values: sum((a - b) ** 2 for a, b in zip(p, values, strict=True)),
            [k * 0.2 for k in range(len(values))],
            constraints=[
                {"type": "ineq", "fun": lambda p, k=k: p[k + 1] - p[k] - 0.1}
                for k in range(len(values) - 1)
            ],
        )
        moved = sum((a - b) ** 2 for a, b in zip(places, values, strict=True))
        assert moved <= best.fun + 1e-5
    assert spread([0.0, 0.95, 1.0], 0.1, 0.0, 1.0) == pytest.approx([0.0, 0.9, 1.0])
    assert spread([0.0, 0.0, 0.9], 0.1, 0.0, 1.0) == pytest.approx([0.0, 0.1, 0.9])
    assert spread([], 0.1, 0.0, 1.0) == []


def test_runs_that_may_end_early_are_refused(write):
    with refused("evaluate.stop_when_worse: true", "missing from the means"):
        read_study(write(set={"evaluate": {"stop_when_worse": True}}))


def test_a_name_is_no_formula(analysed, tmp_path):
    study = complete(analysed({"a $x^{ b$": [0.5, 0.6], "other": [0.7, 0.8]}))
    text = draw_figures(study, tmp_path)[0].read_text(encoding="utf-8")
    assert "a $x^{ b$" in text
