from __future__ import annotations

import pytest
from builders import make_tokenizer, save_model
from messages import complains, refused

from tpaw.models.template_trial import try_template

DOUBLING = (
    "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}"
)
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
LONG = "{{ 'x' * 2000000 }}"
LONG_PROMPT = "{% if add_generation_prompt %}" + LONG + "{% endif %}"
LONG_RESPONSE = "{% if not add_generation_prompt %}" + LONG + "{% endif %}"


@pytest.mark.parametrize(
    "template",
    [DOUBLING, ENDLESS, LONG_PROMPT, LONG_RESPONSE],
    ids=["doubling", "endless", "long prompt", "long response"],
)
def test_a_template_that_does_not_end_or_grows_is_refused(template, monkeypatch):
    monkeypatch.setattr("tpaw.models.template_trial.CPU_SECONDS", 1)
    monkeypatch.setattr("tpaw.models.template_trial.SECONDS", 2.0)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with refused("model.path: m", "chat_template"):
        try_template(tokenizer, "m")


@pytest.mark.parametrize(
    "template",
    [None, "{{ raise_exception('no') }}", "{% for %}", "{% macro a() %}{{ a() }}{% endmacro %}"],
)
def test_a_template_that_only_fails_passes(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    try_template(tokenizer, "m")


def test_a_template_is_tried_once(monkeypatch):
    tokenizer = make_tokenizer()
    try_template(tokenizer, "m")
    monkeypatch.setattr("os.fork", None)
    try_template(tokenizer, "m")


def test_a_run_is_refused_before_its_data_is_read(tmp_path, tpaw_):
    folder = save_model(tmp_path / "m")
    (folder / "chat_template.jinja").write_text(DOUBLING + "{{ n.s }}")
    code, _, err = tpaw_("plan", "starter", f"--set=model.path={folder}", "--set=data.path=none")
    assert code == 2
    complains(err, "chat_template", folder)
