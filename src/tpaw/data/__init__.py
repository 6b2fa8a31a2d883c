"""Records become examples: templated and tokenised once."""
