"""The command line: one file a command under ``commands``; each calls the function of the same name in ``unmask``."""
