"""The built-in backends: one file each, registered through the same hook as any plug-in's."""
