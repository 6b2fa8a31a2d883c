"""Pairwise win rate: a language model says, in both orders, which of two answers is better."""
