"""Studies: methods × settings × seeds over one recipe, and what can be said of them."""
