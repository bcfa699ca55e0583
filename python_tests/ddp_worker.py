"""Run by torchrun in test_trainer.py: trains a few steps in OUTPUT/whole and OUTPUT/sharded.

usage: ddp_worker.py OUTPUT
"""

import os
import sys
from pathlib import Path

import torch
from tiny_training import DDP_RECIPE, tiny_trainer, training_model

from c2c_ext.training.run import leave_processes
from c2c_ext.training.sharding import shard_frozen_models

torch.set_num_threads(1)
output, processes = Path(sys.argv[1]), int(os.environ["WORLD_SIZE"])
tiny_trainer(output / "whole", DDP_RECIPE, processes=processes).train()

model = training_model(DDP_RECIPE)
model.gradient_checkpointing_enable()
shard_frozen_models(model)
tiny_trainer(output / "sharded", DDP_RECIPE, model=model, processes=processes).train()
weight = model.receiver.model.layers[0].mlp.up_proj.weight
assert weight.to_local().numel() * processes == weight.numel()
leave_processes()
