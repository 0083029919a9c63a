"""One thread for all tests: on these sizes more only wait for each other, and much longer on a busy machine."""
import torch

torch.set_num_threads(1)
