"""The configuration of a run: every key jaxlora acts on, checked and frozen."""

from jaxlora.config.run_sections import RunKeys, TrainingKeys
from jaxlora.config.sections import AdapterKeys, DataKeys, ModelKeys

SECTIONS = (ModelKeys, AdapterKeys, DataKeys, TrainingKeys, RunKeys)


# pydantic orders fields from the last base to the first.
class Config(RunKeys, TrainingKeys, DataKeys, AdapterKeys, ModelKeys):
    """One run, with Axolotl's keys as attributes.

    Make it with `jaxlora.config.load.load_config`, which also reads Axolotl's other keys and
    applies the rules between keys; what follows from several keys is in `jaxlora.config.derived`.
    """
