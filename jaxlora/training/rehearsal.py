"""A run up to its first step, without a trace on the disk."""

import tempfile

from jaxlora.checkpoints import run_folder
from jaxlora.config.report import describe_derived
from jaxlora.config.schema import Config
from jaxlora.parallel.mesh import batch_shards
from jaxlora.remote.location import is_storage
from jaxlora.training import resume
from jaxlora.training.describe import describe_data
from jaxlora.training.setup import make_plan


def rehearse(config: Config) -> str:
    """Returns what the data hold and what follows from the keys, with its numbers.

    Model and data are opened as `train` opens them; the tokens go to a folder that is deleted.

    Raises:
      UserError: what `train` would refuse before its first step.
    """
    # What is on object storage would have to be copied to be looked at.
    if not is_storage(config.output_dir):
        run_folder.check(config.output_dir, resume=resume.find_origin(config).continues)
    with tempfile.TemporaryDirectory(prefix="jaxlora-") as folder:
        plan = make_plan(config.model_copy(update={"dataset_prepared_path": folder}))
        replicas = batch_shards(plan.model.placement.mesh)
        derived = describe_derived(config, replicas=replicas, steps_per_epoch=plan.steps_per_epoch)
        return f"{derived}\n\ndata:\n{describe_data(plan)}"
