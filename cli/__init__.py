"""The command line of clips: options -> one config object -> one call -> one report."""
