"""The only door to the operating system: processes, facts, confinement."""
