"""Hugging Face: the shapes of a model from its config.json, a local file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ppsim.checks import checked
from ppsim.errors import InputError
from ppsim.estimate.transformer import Transformer
from ppsim.files import read_json


@checked
def read_huggingface_config(path: str | Path) -> Transformer:
    """The model that a config.json of the transformers library describes; nothing is downloaded or imported.

    Known `model_type`s: gpt2, llama, mistral, qwen2. Fields that the file leaves out take the library's defaults, but
    sizes must be there. Raises InputError that names file, field and value, OSError if the file cannot be read.
    """
    path = Path(path)
    document = read_json(path)
    if not isinstance(document, dict):
        raise InputError(f"{path} must be a JSON object, as a model's config.json is")
    fields = _Fields(path, document)
    kind = document.get("model_type")
    reader = _READERS.get(kind) if isinstance(kind, str) else None
    if reader is None:
        raise InputError(f"{path}: model_type must be one of {', '.join(sorted(_READERS))}, got {kind!r}")
    try:
        return reader(fields)
    except ValueError as error:
        said = str(error)
        raise InputError(said if said.startswith(str(path)) else f"{path}: {said}") from None


class _Fields:
    """The file's fields, each checked as it is read."""

    def __init__(self, path: Path, document: dict[str, Any]) -> None:
        self._path, self._document = path, document

    def whole(self, name: str, default: int | None = None) -> int:
        """A whole number of 1 or more; `default` if the field is absent or null."""
        value = self._document.get(name)
        if value is None and default is not None:
            return default
        if value is None:
            raise InputError(f"{self._path}: {name} is missing: give a whole number of 1 or more")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{self._path}: {name} must be a whole number of 1 or more, got {value!r}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self._document.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise InputError(f"{self._path}: {name} must be true or false, got {value!r}")
        return value

    def has(self, name: str) -> bool:
        """Whether the file has the field, null or not."""
        return name in self._document

    def is_null(self, name: str) -> bool:
        """Whether the field is there and null."""
        return self.has(name) and self._document[name] is None

    def share(self, total: str, parts: str) -> int:
        """One field over another that must divide it."""
        whole, count = self.whole(total), self.whole(parts)
        if whole % count:
            raise InputError(f"{self._path}: {parts} {count} must divide {total} {whole}")
        return whole // count


def _gpt2(fields: _Fields) -> Transformer:
    hidden, heads = fields.whole("n_embd"), fields.whole("n_head")
    return Transformer(
        layers=fields.whole("n_layer"),
        hidden=hidden,
        intermediate=fields.whole("n_inner", 4 * hidden),
        heads=heads,
        kv_heads=heads,
        head_dim=fields.share("n_embd", "n_head"),
        vocabulary=fields.whole("vocab_size"),
        positions=fields.whole("n_positions", 1024),
        tied=fields.flag("tie_word_embeddings", True),
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
    )


def _gated(fields: _Fields, kv_heads: int, **differences: Any) -> Transformer:
    """What llama and its descendants share: gated MLP, RMS norms, rotary positions, grouped queries.

    kv_heads: the library's default where the file does not say; null says as many as there are heads.
    """
    heads = fields.whole("num_attention_heads")
    default = heads if fields.is_null("num_key_value_heads") else kv_heads
    head_dim = fields.whole("head_dim") if fields.has("head_dim") and not fields.is_null("head_dim") else 0
    return Transformer(
        layers=fields.whole("num_hidden_layers"),
        hidden=fields.whole("hidden_size"),
        intermediate=fields.whole("intermediate_size"),
        heads=heads,
        kv_heads=fields.whole("num_key_value_heads", default),
        head_dim=head_dim or fields.share("hidden_size", "num_attention_heads"),
        vocabulary=fields.whole("vocab_size"),
        gated=True,
        tied=fields.flag("tie_word_embeddings", False),
        norm="rmsnorm",
        **differences,
    )


def _llama(fields: _Fields) -> Transformer:
    bias = fields.flag("attention_bias", False)
    heads = fields.whole("num_attention_heads")
    return _gated(fields, heads, qkv_bias=bias, output_bias=bias, mlp_bias=fields.flag("mlp_bias", False))


def _mistral(fields: _Fields) -> Transformer:
    window = None if fields.is_null("sliding_window") else fields.whole("sliding_window", 4096)
    return _gated(fields, 8, window=window)


def _qwen2(fields: _Fields) -> Transformer:
    if fields.flag("use_sliding_window", False):
        raise InputError("use_sliding_window true gives layers different windows, which is not modelled: set it false")
    return _gated(fields, 32, qkv_bias=True)


_READERS: dict[str, Callable[[_Fields], Transformer]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
}
