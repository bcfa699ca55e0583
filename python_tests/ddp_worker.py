"""Run by torchrun in test_trainer.py: trains a few steps. usage: ddp_worker.py OUTPUT"""

import os
import sys
from pathlib import Path

import torch
from tiny_training import DDP_RECIPE, tiny_trainer

torch.set_num_threads(1)
processes = int(os.environ["WORLD_SIZE"])
tiny_trainer(Path(sys.argv[1]), DDP_RECIPE, processes=processes).train()
