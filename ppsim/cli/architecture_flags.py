"""Architecture flags: which transformer, by its config.json or by its shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ppsim.cli.command import OptionalFile, OptionalWhole
from ppsim.errors import InputError
from ppsim.essential import Essential
from ppsim.estimate.huggingface import read_huggingface_config
from ppsim.estimate.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class ArchitectureFlags:
    """A model by its file, or a GPT by its shapes."""

    huggingface: Essential[OptionalFile] = None
    """A model's config.json, as of transformers (deepseek_v3, gpt_oss, llama, qwen3_moe, ...); instead of shapes."""
    layers: Essential[OptionalWhole] = None
    """Blocks of a GPT (layer norms, biases, learned positions); with --hidden and --heads."""
    hidden: Essential[OptionalWhole] = None
    """Width of the residual stream."""
    heads: Essential[OptionalWhole] = None
    """Attention heads."""
    vocabulary: OptionalWhole = None
    """Size of the vocabulary (default: 50257)."""

    def architecture(self, seq: int, *, mtp: bool = False) -> Transformer:
        """The model that the flags name. Raises InputError for flags that are missing or contradict."""
        flags: dict[str, Any] = {"layers": self.layers, "hidden": self.hidden, "heads": self.heads}
        given = [name for name, value in {**flags, "vocabulary": self.vocabulary}.items() if value is not None]
        if self.huggingface is not None:
            if given:
                raise InputError(f"--huggingface holds the whole model: leave out --{given[0]} or --huggingface")
            model = read_huggingface_config(self.huggingface, mtp=mtp)
        else:
            missing = [name for name, value in flags.items() if value is None]
            if missing:
                raise InputError(
                    f"--{missing[0]} is missing: give --layers, --hidden and --heads, or --huggingface FILE"
                )
            vocabulary = 50257 if self.vocabulary is None else self.vocabulary
            model = Transformer.gpt(**flags, vocabulary=vocabulary, positions=max(seq, 1), tied=False)
        return model
