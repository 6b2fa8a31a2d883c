"""What a person looks at: progress, tables, summaries. The HTML page will live here too."""
