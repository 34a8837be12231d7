"""Checks METHOD against the plugin's own list, and prints the number of GPUs.

python methods.py METHOD
"""

from __future__ import annotations

import sys

import torch

from admin_fairseq.architectures import METHODS

if __name__ == "__main__":
    if sys.argv[1] not in METHODS:
        sys.exit(f"error: METHOD={sys.argv[1]}: choose one of {', '.join(METHODS)}")
    print(torch.cuda.device_count())
