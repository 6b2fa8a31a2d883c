"""Pairwise win rate: a judge model compares the responses of two systems, in both orders."""
