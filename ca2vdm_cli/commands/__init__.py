"""One module a command (or family of commands): what happens once the flags are read."""
