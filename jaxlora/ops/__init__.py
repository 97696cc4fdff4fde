"""F1: pure functions on arrays and weight leaves."""
