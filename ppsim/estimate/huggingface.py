"""Hugging Face: the shapes of a model from its config.json, a local file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ppsim.checks import checked
from ppsim.errors import InputError
from ppsim.estimate.config_fields import ConfigFields
from ppsim.estimate.huggingface_families import FAMILIES
from ppsim.estimate.transformer import Transformer
from ppsim.files import read_json

# What models of pictures, sound or both have beside the language model.
_TOWERS = ("vision_config", "audio_config")


@checked
def read_huggingface_config(path: str | Path, *, mtp: bool = False) -> Transformer:
    """The model that a config.json of the transformers library describes; nothing is downloaded or imported.

    Parameters
    ----------
    path : str or Path
        The file. A model of pictures is read as the language model that its `text_config` describes.
    mtp : bool
        Whether the layers that predict further tokens, which some files count in `num_nextn_predict_layers`, are part
        of the model. By default they are left out, as they are of published counts.

    Returns
    -------
    Transformer
        Its `left_out` says what of the file is not counted.

    Raises
    ------
    InputError
        Names file, field and value: for a `model_type` that is not known, a size that is missing or wrong, and for
        fields that may change the count and that are not known. OSError if the file cannot be read.

    Notes
    -----
    Fields that the file leaves out take the library's defaults, but sizes must be there. What counts as a parameter are
    the tensors of the published files: the numbers that balance the load of DeepSeek-V3's experts do, although no
    gradient trains them.
    """
    path = Path(path)
    document = read_json(path)
    if not isinstance(document, dict):
        raise InputError(f"{path} must be a JSON object, as a model's config.json is")
    kind, fields, left_out = _language_model(path, document)
    read = FAMILIES.get(kind) if isinstance(kind, str) else None
    if read is None:
        raise InputError(f"{path}: model_type must be one of {', '.join(sorted(FAMILIES))}, got {kind!r}")
    try:
        model = read(fields)
        further = fields.whole("num_nextn_predict_layers", 0, least=0)
        fields.check_all_read(str(kind))
        if further and not mtp:
            left_out.append(f"num_nextn_predict_layers: {further} layers that predict further tokens")
        return replace(model, left_out=tuple(left_out), mtp_layers=further if mtp else 0)
    except InputError as error:
        said = str(error)
        raise InputError(said if said.startswith(str(path)) else f"{path}: {said}") from None


def _language_model(path: Path, document: dict[str, Any]) -> tuple[Any, ConfigFields, list[str]]:
    """Its kind, its fields, and what else the file has."""
    text = document.get("text_config")
    if not isinstance(text, dict):
        return document.get("model_type"), ConfigFields(path, document), []
    # The outer file decides on the tie if it says anything.
    shared = {name: document[name] for name in ("tie_word_embeddings",) if document.get(name) is not None}
    left_out = [f"{name}: the model's {name.removesuffix('_config')} part" for name in _TOWERS if document.get(name)]
    return text.get("model_type", document.get("model_type")), ConfigFields(path, {**text, **shared}), left_out
