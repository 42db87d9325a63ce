"""Log-probs of a trajectory, computed again by transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from areal.types import Trajectory


def logprobs_of(model: Path, t: Trajectory) -> np.ndarray:
    """float32 [L], of the whole sequence as it stands; 0 for the first token."""
    with torch.no_grad():
        logprobs = AutoModelForCausalLM.from_pretrained(model)(torch.from_numpy(t.input_ids)[None]).logits[0, :-1].log_softmax(-1)
    return np.concatenate([[0], logprobs.gather(1, torch.from_numpy(t.input_ids[1:])[:, None])[:, 0].numpy()])
