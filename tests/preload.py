"""Imported once by the server that test ranks are forked from. Nothing here may start a thread."""

import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor  # noqa: F401

import aria_train.train.session  # noqa: F401
from aria_train.parallel import shard

shard.SMALLEST_UNIT = 0  # the models here are tiny, and laid out like large ones
