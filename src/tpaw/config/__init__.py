"""The configuration of a run: settings, YAML files, error messages and the plan."""
