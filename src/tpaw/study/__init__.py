"""Studies: methods × settings × seeds over one recipe, with statistics."""
