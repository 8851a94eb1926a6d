"""The built-in backends, one per file; they are registered through the same hook as those of plug-ins."""
