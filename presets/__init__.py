"""Presets as YAML files, with the weights and the digit images that they need. Read by ``ca2vdm_cli.presets``."""
