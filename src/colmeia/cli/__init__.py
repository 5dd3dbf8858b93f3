"""The command line: arguments in, tables out. Knows only the SDK; every noun's module is loaded when it is used."""
