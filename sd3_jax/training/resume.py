"""Where a run begins: at its newest checkpoint, or at step 0 from new parameters."""

import contextlib
import json
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from etils import epath
from ml_collections import ConfigDict

from sd3_jax.assembly import compatibility, encoder_identity, finetune_start
from sd3_jax.checkpoints.integrity import UnreadableCheckpoint
from sd3_jax.checkpoints.manager import Checkpoints
from sd3_jax.checkpoints.restoring import saved_config
from sd3_jax.training.program import Program, initial_state
from sd3_jax.training.run_progress import RunProgress
from sd3_jax.training.state import TrainState

log = logging.getLogger(__name__)


class TrainedOn(NamedTuple):
    """What a run trains on; it is saved with each step and compared on resume."""

    data: dict  # the source's identity, as JSON gives it back
    base: str  # fingerprint of the weights that the run started from, "" without
    encoders: Mapping[str, str]  # fingerprints of the text encoders and autoencoder

    @classmethod
    def of(cls, source: Any, base: dict, encoders: Mapping[str, str]) -> "TrainedOn":
        # Through JSON, as a checkpoint keeps it: a tuple compares equal as a list.
        data = json.loads(json.dumps(source.identity()))
        return cls(data, finetune_start.identity(base), encoders)


def data_record(
    step: int, progress: RunProgress, trained_on: TrainedOn
) -> dict[str, Any]:
    """The data position of a step, for its checkpoint; `restore` reads it."""
    skipped = progress.nonfinite.skipped
    record = {"next_step": step, "skipped": skipped, "source": trained_on.data}
    if progress.batches_ahead:
        record["next_batch"] = step + progress.batches_ahead
    if trained_on.base:
        record["base"] = trained_on.base
    if trained_on.encoders:
        record["encoders"] = trained_on.encoders
    return record


class Start(NamedTuple):
    """What a run begins with."""

    state: TrainState
    step: int  # steps that are done
    skipped: int = 0  # of these, those without an update
    batches_ahead: int = 0  # see RunProgress


def restore_or_initialise(
    config: ConfigDict,
    workdir: epath.Path,
    checkpoints: Checkpoints,
    program: Program,
    key: jax.Array,
    base: dict,
    trained_on: TrainedOn,
) -> Start:
    """The newest checkpoint's state, or a new one, sharded from birth.

    UserError if the run would resume with settings, examples, encoders or base weights
    that differ from the checkpoint's and are not declared in config.train.changes.
    """
    if checkpoints.latest() is None:
        adapter = finetune_start.initial_adapter(config, program.parts)
        return Start(initial_state(program, key, base=base, adapter=adapter), step=0)
    return restore(config, workdir, checkpoints, program.abstract, trained_on)


def restore(
    config: ConfigDict,
    workdir: epath.Path,
    checkpoints: Checkpoints,
    abstract: TrainState,
    trained_on: TrainedOn,
) -> Start:
    """The state of the newest sound checkpoint, once the run may resume from it."""
    # Settings are compared before the state is read: a changed width would otherwise be
    # reported as leaves that do not fit, without the key that changed.
    newest_config = {}
    with contextlib.suppress(UnreadableCheckpoint):  # restore will see to it
        newest_config = saved_config(checkpoints.directory)
    compatibility.compare(workdir, newest_config, config)
    state, record, restored_config = checkpoints.restore(abstract)
    # A damaged step is set aside and an earlier one is taken, perhaps with another
    # config: compare again then.
    if restored_config != newest_config:
        compatibility.compare(workdir, restored_config, config)
    compatibility.compare_data(workdir, record.get("source"), trained_on.data, config)
    finetune_start.compare(workdir, record.get("base", ""), trained_on.base)
    saved_encoders = record.get("encoders", {})  # older checkpoints do not say
    encoder_identity.compare(workdir, saved_encoders, trained_on.encoders, config)
    step, batches_ahead = record["next_step"], 0
    if step < config.train.steps:  # else nothing follows that these could change
        compatibility.compare_rate(workdir, restored_config, config, step)
        batches_ahead = compatibility.batches_ahead(record, restored_config, config)
    log.info("resuming from step %d of %s", step, workdir)
    return Start(state, step, record.get("skipped", 0), batches_ahead)
