"""What people are told, held in one file: tests name keys and values, messages.yaml the wording.

    with refused("train.learning_rate", "-1"):
        RunConfig.load(...)

`make messages` writes the file anew. Whoever changes a text reviews the difference of that file.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import re
from pathlib import Path

import pytest
import yaml

from tpaw.errors import InputError

TESTS = Path(__file__).parent
FILE = TESTS / "messages.yaml"
# What differs between machines, or is worded by other libraries.
DIFFERENCE = {"difference": re.compile(r"(?<=by )[\d.e+-]+")}
IN_BRACKETS = {"reason": re.compile(r"(?<=\().*(?=\))")}
HEADER = "# What people are told, by test. Written by `make messages`; review its difference.\n"


class Golden:
    """The texts of the file, and those of this session.

    Attributes:
        texts: the file's, by node id.
        said: this session's.
        collected: node ids by file, of the files that were collected as a whole.
        updates: whether the file is to be written anew.
        folders: what stands for folders that are others in each session.
    """

    def __init__(self, file=FILE):
        self.file = file
        self.said = {}
        self.collected = {}
        self.updates = False
        self.node = None
        self.folders = {str(TESTS.parent): "<repository>"}

    @functools.cached_property
    def texts(self):
        return read(self.file)

    @contextlib.contextmanager
    def telling(self, node):
        """Within a test; one that passes has said everything that the file has of it."""
        self.node, self.said[node] = node, []
        try:
            yield
            if not self.updates and len(self.said[node]) < len(self.texts.get(node, [])):
                pytest.fail(f"not every text of {self.file.name} was said", False)
        except BaseException:
            del self.said[node]
            raise

    def check(self, text):
        """Compare the next text of the test with the file's, or keep it for the file."""
        for folder, name in self.folders.items():
            # Below the folder of a session, each test has one of its own.
            text = re.sub(re.escape(folder) + (r"/[\w-]+" if name == "<tmp>" else ""), name, text)
        text = re.sub(r"0x[0-9a-f]+", "<address>", text)
        # The size of a file depends on the versions that wrote it.
        text = re.sub(r"\b\d+ bytes\b|(?<=published with )\d+|(?<=header says )\d+", "<size>", text)
        text = re.sub(r"(?<=127\.0\.0\.1:)\d{4,}", "<port>", text)
        text = re.sub(r"\b(?=[0-9a-f]*\d)[0-9a-f]{12,64}\b", "<hash>", text)
        # What follows is worded by the openai library.
        text = re.sub(r"(?<=Error code: \d\d\d)[^\n]*", " <reason>", text)
        said = self.said[self.node]
        said.append(text)
        if self.updates:
            return
        known = self.texts.get(self.node, [])
        if len(known) < len(said):
            pytest.fail(f"no text in {self.file.name}; run `make messages`:\n{text}", False)
        if known[len(said) - 1] != text:
            lines = difflib.ndiff(known[len(said) - 1].splitlines(), text.splitlines())
            hint = "another wording; if it is meant, run `make messages` and review the difference"
            pytest.fail("\n".join([hint, *lines]), False)

    def stale(self):
        """Node ids of the file that no test has any more."""
        files = {node: node.partition("::")[0] for node in self.texts}
        return {n for n, f in files.items() if f in self.collected and n not in self.collected[f]}

    def write(self):
        """Write the file anew; tests that did not run keep what they have."""
        stale = self.stale()
        kept = {node: texts for node, texts in self.texts.items() if node not in stale}
        write(self.file, kept | self.said)


def read(file):
    """Texts by node id."""
    if not file.exists():
        return {}
    tree = yaml.load(file.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}
    return {f"{path}::{test}": texts for path, of in tree.items() for test, texts in of.items()}


def write(file, texts):
    tree = {}
    for node, said in texts.items():
        path, _, test = node.partition("::")
        if said:
            tree.setdefault(path, {})[test] = said
    body = yaml.dump(tree, Dumper=_Dumper, allow_unicode=True, width=10**6, sort_keys=True)
    file.write_text(HEADER + body)


class _Dumper(yaml.SafeDumper):
    """Lines stay lines."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    ),
)

GOLDEN = Golden()


def says(text, *parts, hide=None):
    """Assert that a text names all parts, keys and values, and is worded as the file has it.

    Args:
        hide: name -> what differs from run to run, as text or as a compiled pattern.
    """
    for part in parts:
        assert str(part) in text
    for name, what in (hide or {}).items():
        pattern = what if isinstance(what, re.Pattern) else re.escape(str(what))
        text = re.sub(pattern, f"<{name}>", text)
    GOLDEN.check(text)


@contextlib.contextmanager
def refused(*parts, error=InputError, hide=None):
    """Assert that an error is raised and `says` what it should."""
    with pytest.raises(error) as caught:
        yield caught
    says(str(caught.value), *parts, hide=hide)


def by_first(names, cases):
    """Parametrize; a case is called by its first value, and not by what is said of it."""
    return pytest.mark.parametrize(names, cases, ids=[str(case[0]) for case in cases])


def complains(err, *parts, hide=None):
    """The same of what a command prints when it refuses: without progress and without traceback."""
    assert "Traceback" not in err
    assert "\x1b" not in err
    [text] = re.findall(r"^tpaw: .*", err, re.DOTALL | re.MULTILINE)
    says(text.rstrip("\n"), *parts, hide=hide)


def prose(out):
    """What a command prints beside its tables."""
    lines = (line.strip() for line in out.splitlines())
    return " ".join(" ".join(line for line in lines if line[:1] not in "┏┃┡│├└╇─").split())
