"""One file a command (or two that belong together). Each imports what it needs when it runs, so that ``list`` stays fast."""
