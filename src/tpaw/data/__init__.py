"""Read records and turn them into examples, which are templated and tokenised."""
