"""The file of messages is held to: another wording fails, and so does a key that is not named."""

from __future__ import annotations

import messages
import pytest
from messages import GOLDEN, Golden, refused, says

from tpaw.errors import InputError

TEST = "tests/test_a.py::test_a[0]"
TEXT = "train.epochs: 0\nis too few"


@pytest.fixture
def tell(tmp_path, monkeypatch):
    """Says texts as a test, against a file with one text of it."""
    file = tmp_path / "messages.yaml"
    messages.write(file, {TEST: [TEXT]})

    def tell(*texts, node=TEST, updates=False, **options):
        golden = Golden(file)
        golden.updates = updates
        golden.folders[str(tmp_path.parent)] = "<tmp>"
        with monkeypatch.context() as patch, golden.telling(node):
            patch.setattr(messages, "GOLDEN", golden)
            for text in texts:
                says(text, "train.epochs", **options)
        return golden

    return tell


def test_the_same_words_pass(tell):
    tell(TEXT)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["train.epochs: 0\nis too little"], "another wording"),
        ([TEXT, TEXT], "no text in messages.yaml"),
        ([], "not every text of messages.yaml was said"),
    ],
)
def test_other_words_fail_and_so_do_more_and_fewer_texts(tell, texts, message):
    with pytest.raises(pytest.fail.Exception, match=message):
        tell(*texts)


def test_a_test_without_a_text_fails(tell):
    with pytest.raises(pytest.fail.Exception, match="run `make messages`"):
        tell(TEXT, node="tests/test_a.py::test_b")


def test_a_text_must_name_every_part_even_when_the_file_is_written(tell):
    with pytest.raises(AssertionError):
        tell("train.epoch: 0", updates=True)


def test_folders_and_what_is_hidden_are_the_same_each_time(tell, tmp_path):
    golden = tell(f"train.epochs {tmp_path}/x, pid 123", updates=True, hide={"pid": 123})
    assert golden.said == {TEST: ["train.epochs <tmp>/x, pid <pid>"]}


def test_the_file_is_written_in_order_and_drops_what_no_test_says(tell):
    golden = tell("train.epochs: é", node="tests/test_a.py::test_b", updates=True)
    golden.write()  # of part of a file: the rest stays
    assert messages.read(golden.file) == {
        TEST: [TEXT],
        "tests/test_a.py::test_b": ["train.epochs: é"],
    }
    golden.collected = {"tests/test_a.py": ["tests/test_a.py::test_b"]}
    golden.write()
    assert golden.file.read_text() == (
        f"{messages.HEADER}tests/test_a.py:\n  test_b:\n  - 'train.epochs: é'\n"
    )


def test_refused_asks_for_the_error():
    with pytest.raises(pytest.fail.Exception), refused("x"):
        pass
    with pytest.raises(ValueError, match="other"), refused("x"):
        raise ValueError("other")
    with refused("train.epochs", 0):
        raise InputError("train.epochs: 0 is not allowed")


def test_every_text_of_the_file_belongs_to_a_test():
    assert not GOLDEN.stale()
