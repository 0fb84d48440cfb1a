"""Config fields: what a model's config.json says, each field checked as it is read, and which were not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppsim.checks import check_whole, shown
from ppsim.errors import InputError
from ppsim.estimate.transformer import check_layers

# Names of fields that may change how many parameters or products a model has.
_SHAPES = re.compile(
    r"size|dim|rank|head|layer|expert|bias|inter|hidden|width|depth|norm|window|chunk|pattern|mtp|nextn|predict|lora|tie|"
    r"vocab|conv|mlp|attn|attention|moe|ffn|shared|index|memory|recurren|ssm|mamba|^num_|^n_|_k$|cross|adapter|altup|"
    r"laurel|per_layer"
)
# Those of them that do not: how numbers are initialized, turned, scaled, dropped, chosen or generated.
_HARMLESS = re.compile(
    r".*(_ids?|_token|_token_index|dropout|pdrop|_eps|epsilon|_act|activation|_coef|theta|scaling|_scale|capping|_alpha"
    r"|_multiplier|dtype|_range|_std|_noise|_factor|_prob|_implementation|_weights|embeddings|_scalar|_method|_func|_loss)"
    r"|(rope|rotary|quantization|output_|use_cache|return_|is_|id2label|label2id|tokenizer|task_|problem_|summary_|router_"
    r"|architectures|auto_map|torch_|transformers_|_name|model_type|scale_attn|attn_temperature|max_position|beta_|seq_aux"
    r"|diversity|length_|repetition|num_beam|num_return|no_repeat|encoder_no_repeat|chunk_size_feed|early_stop|min_length"
    r"|max_length|begin_suppress|bad_words|suppress|typical|top_|pruned|finetuning|tf_|remove_invalid|do_sample"
    r"|exponential|prefix|sep_).*"
    r"|n_group|n_ctx|topk_group|ep_size|pretraining_tp|original_max_position_embeddings|initial_context_length|clip_qkv"
    r"|use_bidirectional_attention|attention_type|use_flash_attn|reorder_and_upcast_attn|moe_norm_min|first_norm"
)


class ConfigFields:
    """The fields of a config.json, or of a part of it.

    Parameters
    ----------
    path : Path
        The file, for messages.
    document : mapping
        The fields.
    """

    def __init__(self, path: Path, document: Mapping[str, Any]) -> None:
        self.path, self._document = path, document
        self._read: set[str] = set()

    def whole(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number of `least` or more; `default` if the field is absent or null."""
        value: int | None = self._get(name)
        if value is None and default is not None:
            return default
        if value is None:
            raise InputError(f"{self.path}: {name} is missing: give a whole number of {least} or more")
        check_whole(f"{self.path}: {name}", value, least=least)
        return value

    def layers(self, name: str) -> int:
        """How many blocks the model has; `check_layers` says how many there may be."""
        count = self.whole(name)
        check_layers(f"{self.path}: {name}", count)
        return count

    def first_whole(self, *names: str) -> int:
        """A whole number that the file has under one of several names."""
        present = [name for name in names if self.has_value(name)]
        for name in names:
            self.ignore(name)
        return self.whole(present[0] if present else names[0])

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self._get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise InputError(f"{self.path}: {name} must be true or false, got {value!r}")
        return value

    def numbers(self, name: str, least: int = 0) -> list[int] | None:
        """A list of `least` or more whole numbers of 0 or more; None if it is absent, null or empty."""
        value = self._get(name)
        if value is None or value == []:
            return None
        is_list = isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)
        if not is_list:
            raise InputError(f"{self.path}: {name} must be a list of whole numbers of 0 or more, got {shown(value)}")
        if len(value) < least:
            raise InputError(f"{self.path}: {name} must have {least} numbers, one for each layer, got {shown(value)}")
        return list(value)

    def words(self, name: str, count: int, known: Mapping[str, str]) -> list[str] | None:
        """A list of `count` words, each one of `known`, as what they mean there; None if it is absent or null."""
        value = self._get(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) < count:
            raise InputError(f"{self.path}: {name} must be a list of {count} words, got {shown(value)}")
        for index, word in enumerate(value[:count]):
            if not isinstance(word, str) or word not in known:
                raise InputError(
                    f"{self.path}: {name}[{index}] is {shown(word)}, which is not modelled: take one of "
                    f"{', '.join(known)}"
                )
        return [known[word] for word in value[:count]]

    def text(self, name: str) -> str | None:
        """A text; None if it is absent or no text."""
        value = self._get(name)
        return value if isinstance(value, str) else None

    def has_value(self, name: str) -> bool:
        """Whether the file has the field, and not null."""
        return self._get(name) is not None

    def is_null(self, name: str) -> bool:
        """Whether the field is there and null."""
        return name in self._document and self._get(name) is None

    def share(self, total: str, parts: str) -> int:
        """One field over another that must divide it."""
        whole, count = self.whole(total), self.whole(parts)
        if whole % count:
            raise InputError(f"{self.path}: {parts} {count} must divide {total} {whole}")
        return whole // count

    def ignore(self, *names: str) -> None:
        """Fields that say nothing here."""
        self._read.update(names)

    def check_all_read(self, kind: str) -> None:
        """Raise InputError for fields that may change the count and that nobody read."""
        unknown = [
            name
            for name, value in self._document.items()
            if name not in self._read and value and _SHAPES.search(name) and not _HARMLESS.fullmatch(name)
        ]
        if unknown:
            said = ", ".join(f"{name} {shown(self._document[name])}" for name in unknown)
            raise InputError(
                f"{self.path}: {said} may change what is counted, and no {kind} that is known here has it: "
                "take it out if it changes nothing"
            )

    def _get(self, name: str) -> Any:
        self._read.add(name)
        return self._document.get(name)
