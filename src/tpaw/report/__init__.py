"""What a person looks at: tables, summaries, figures."""
