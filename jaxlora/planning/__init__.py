"""Memory and time of a run before it starts: the train step compiled from shapes alone."""
