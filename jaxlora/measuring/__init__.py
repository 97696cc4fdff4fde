"""F4: what a run reaches on this machine, measured."""
