"""Packaged manifests: one YAML file is one run (``clips run quickstart``); prompts are in ``prompts/``."""
