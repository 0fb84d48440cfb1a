"""Checkpoints: what one holds, read in one process."""

from __future__ import annotations

import torch
import torch.distributed.checkpoint


def held(folder: str) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    reader = torch.distributed.checkpoint.FileSystemReader(folder)
    metadata = reader.read_metadata().state_dict_metadata
    found = {
        key: torch.zeros(value.size, dtype=value.properties.dtype)
        for key, value in metadata.items()
        if hasattr(value, "size")
    }
    torch.distributed.checkpoint.load(found, checkpoint_id=folder, no_dist=True)
    return found
