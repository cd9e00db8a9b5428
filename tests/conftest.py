"""What all tests share: one thread (bits must not depend on the machine's cores)."""

import torch

torch.set_num_threads(1)
