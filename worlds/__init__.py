"""Small worlds in which one can see when a method beats SFT: each makes a model and its rows."""
