"""Training a simulation with transformers' Trainer: packed checkpoints beside its own.

student = mpq.simulate(model, allocation, learned=True)
Trainer(student, arguments, train_dataset=data, callbacks=[ExportCallback(allocation)]).train()
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mpq.core.allocation import Allocation
from mpq.core.errors import MpqError
from mpq.exporters import export
from mpq.trained import is_simulation

FOLDER = "packed"  # in the folder of each checkpoint, and in the output folder at the end


class ExportCallback(TrainerCallback):
    """Writes the model packed, with exactly the numbers it computes with, into `packed/` at every save and at the end.

    Args:
        allocation: that the model was simulated in.
        options: of `mpq.export`, such as `to` or `side_files`.
    """

    def __init__(self, allocation: Allocation, **options: Any) -> None:
        self.allocation, self.options = allocation, options

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """MpqError when the model is no trainable simulation, before the first step."""
        if not is_simulation(kwargs["model"]):
            raise MpqError(
                "the Trainer's model is no simulation: give it mpq.simulate(model, allocation, learned=True)"
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write beside the checkpoint that was just saved."""
        self._write(Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", state, kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write into the output folder."""
        self._write(Path(str(args.output_dir)), state, kwargs)

    def _write(self, folder: Path, state: TrainerState, given: Mapping[str, Any]) -> None:
        if state.is_world_process_zero:
            export(given["model"], self.allocation, folder / FOLDER, **self.options)
