"""Studies: methods × settings × seeds of one recipe, with statistics over seeds."""
