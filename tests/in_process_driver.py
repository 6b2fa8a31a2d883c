"""`tpaw`, which then prints what it has imported and begun beside its own process, as JSON."""

from __future__ import annotations

import json
import sys

from tpaw.cli.main import main

# Other programs, and sockets to listen at or to ask somebody by.
EVENTS = (
    *("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system"),
    *("socket.bind", "socket.connect"),
)
OTHERS = ("ray", "openai", "vllm")


def watched():
    """Call the command line; the last line that is printed says what was seen."""
    begun = []

    def note(event, arguments):
        if event in EVENTS:
            begun.append(f"{event} {arguments[:2]}")

    sys.addaudithook(note)
    try:
        main()
    finally:
        others = [name for name in sys.modules if name.partition(".")[0] in OTHERS]
        print(json.dumps({"begun": begun, "imported": others}))
