"""Step 6: tables, summaries, reports and figures for people."""
