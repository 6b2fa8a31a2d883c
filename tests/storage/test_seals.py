"""Seals: a checksum inside the file."""

from __future__ import annotations

import hashlib
import json

import pytest
import yaml

from tpaw.storage.seals import are_intact, is_intact, seal_facts, seal_text

TEXT = "a: 1\nb:\n  c: 2\n"
FACTS = {"θ": 1, "b": {"c": [1.5, None]}}


def test_a_sealed_file_reads_as_before_and_carries_the_hash_of_the_rest():
    assert yaml.safe_load(seal_text(TEXT)) == {"a": 1, "b": {"c": 2}}
    assert seal_text(TEXT).split()[-1] == hashlib.sha256(TEXT.encode()).hexdigest()
    again = json.loads(json.dumps(seal_facts(FACTS)))
    assert again.keys() - FACTS.keys() == {"sha256"}
    assert are_intact(again) is True
    assert is_intact(seal_text(TEXT)) is True


def test_without_a_seal_nothing_is_said():
    assert is_intact(TEXT) is None
    assert is_intact("") is None
    assert are_intact(FACTS) is None


def test_any_edit_and_any_cut_is_seen():
    whole = seal_text(TEXT)
    for edited in ("a: 2" + whole[4:], whole + "c: 3\n", "\n" + whole, whole.upper()):
        assert not is_intact(edited)
    for end in range(len(whole)):
        assert not is_intact(whole[:end])


@pytest.mark.parametrize("change", [{"θ": 2}, {"new": 1}, {"sha256": "0"}, {"sha256": None}])
def test_any_changed_value_is_seen(change):
    assert are_intact(seal_facts(FACTS) | change) is False


def test_sealing_again_replaces_the_seal():
    assert seal_facts(seal_facts(FACTS)) == seal_facts(FACTS)
