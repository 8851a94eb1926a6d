"""One module per command (or family of commands): what runs after the flags are parsed."""
