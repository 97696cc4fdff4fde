"""F3: one file describes a run; Axolotl's keys, checked as a whole before anything starts."""
