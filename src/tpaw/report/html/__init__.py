"""report.html: one file that shows what a run did. It needs no network and no server."""
