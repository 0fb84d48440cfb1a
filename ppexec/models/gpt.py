"""The built-in GPT: a decoder of bytes with learned positions and pre-norm blocks (Radford et al., 2019).

The chain that is cut into stages:

    embedding | block 0 | block 1 | ... | block layers-1 | final norm and head

`--layers` counts blocks. The embedding goes with the first stage, and the head with the last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from ppexec.models.dropout import Randomness, SeededDropout
from ppexec.models.model import Model
from ppexec.models.text import load_text, window

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle

    from ppexec.config.config import RunConfig

_STD = 0.02


class Linear(nn.Linear):
    """A linear layer whose weights start normal with standard deviation `std`, and its bias at zero."""

    def __init__(self, width: int, out: int, *, std: float = _STD, bias: bool = True, dtype: torch.dtype) -> None:
        self.std = std  # before the parent draws its weights
        super().__init__(width, out, bias=bias, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw the weights."""
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Table(nn.Embedding):
    """An embedding that starts normal with standard deviation 0.02."""

    def reset_parameters(self) -> None:
        """Draw the rows."""
        nn.init.normal_(self.weight, std=_STD)


class Positions(Table):
    """A vector for each position. It takes a length instead of indices, so autograd saves no indices."""

    def forward(self, seq: int) -> torch.Tensor:  # type: ignore[override]
        """The first `seq` positions, (seq, hidden)."""
        return self.weight[:seq]


class Embedding(nn.Module):
    """The sum of token and position vectors: (batch, seq) of int64 -> (batch, seq, hidden)."""

    def __init__(self, vocabulary: int, hidden: int, seq: int, *, dropout: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.tokens = Table(vocabulary, hidden, dtype=dtype)
        self.positions = Positions(seq, hidden, dtype=dtype)
        self.dropout = dropout

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(batch, seq) -> (batch, seq, hidden)."""
        return self.dropout(self.tokens(inputs) + self.positions(inputs.shape[1]))


class Attention(nn.Module):
    """Causal self-attention. Heads stand side by side in the columns of q, k and v, so each tp rank has whole heads."""

    def __init__(self, hidden: int, heads: int, *, residual_std: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.head_size = hidden // heads
        self.q = Linear(hidden, hidden, dtype=dtype)
        self.k = Linear(hidden, hidden, dtype=dtype)
        self.v = Linear(hidden, hidden, dtype=dtype)
        self.o = Linear(hidden, hidden, std=residual_std, dtype=dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(batch, seq, hidden) -> (batch, seq, hidden)."""
        batch, seq, _ = inputs.shape
        q, k, v = (
            project(inputs).view(batch, seq, -1, self.head_size).transpose(1, 2) for project in (self.q, self.k, self.v)
        )
        heads = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(heads.transpose(1, 2).reshape(batch, seq, -1))


class Block(nn.Module):
    """Pre-norm attention and MLP, each on a residual branch: (batch, seq, hidden) -> (batch, seq, hidden)."""

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        heads: int,
        *,
        residual_std: float,
        dropouts: tuple[nn.Module, nn.Module],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden, dtype=dtype)
        self.attention = Attention(hidden, heads, residual_std=residual_std, dtype=dtype)
        self.norm2 = nn.LayerNorm(hidden, dtype=dtype)
        self.fc1 = Linear(hidden, intermediate, dtype=dtype)
        self.activation = nn.GELU()
        self.fc2 = Linear(intermediate, hidden, std=residual_std, dtype=dtype)
        self.dropout1, self.dropout2 = dropouts

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(batch, seq, hidden) -> (batch, seq, hidden)."""
        middle = inputs + self.dropout1(self.attention(self.norm1(inputs)))
        return middle + self.dropout2(self.fc2(self.activation(self.fc1(self.norm2(middle)))))


class Head(nn.Module):
    """The final norm and the logits of the next byte: (batch, seq, hidden) -> (batch, seq, vocabulary)."""

    def __init__(self, vocabulary: int, hidden: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden, dtype=dtype)
        self.logits = Linear(hidden, vocabulary, bias=False, dtype=dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(batch, seq, hidden) -> (batch, seq, vocabulary)."""
        return self.logits(self.norm(inputs))


def gpt(config: RunConfig) -> Model:
    """Build the built-in GPT: `config.layers` blocks between embedding and head, trained on a text's bytes.

    Inputs and targets are int64 of shape (samples, seq): windows of the text, and the same moved on by one
    byte. The loss is the cross entropy of each next byte.

    Raises
    ------
    InputError
        If the text cannot be read. `sample` raises it for a text that is shorter than a window.

    Notes
    -----
    Weights start normal with standard deviation 0.02. Those that end a residual branch are divided by
    sqrt(2 layers) (Radford et al., 2019). Dropout acts on the sum in the embedding and on the residual branches, where
    activations are whole on every rank of tp. Attention probabilities are not dropped, since the fused kernel draws
    random numbers that differ from mesh to mesh.
    """
    randomness = Randomness(config.seed) if config.dropout else None

    def dropout(layer: int, site: str) -> nn.Module:
        if randomness is None:
            return nn.Identity()
        return SeededDropout(config.dropout, layer=layer, site=site, randomness=randomness)

    last, dtype = config.layers + 1, config.torch_dtype
    with torch.device("meta"):
        layers: list[nn.Module] = [
            Embedding(config.vocabulary, config.hidden, config.seq, dropout=dropout(0, "embedding"), dtype=dtype),
            *(
                Block(
                    config.hidden,
                    config.intermediate,
                    config.heads,
                    residual_std=_STD / (2 * config.layers) ** 0.5,
                    dropouts=(dropout(layer, "attention"), dropout(layer, "mlp")),
                    dtype=dtype,
                )
                for layer in range(1, last)
            ),
            Head(config.vocabulary, config.hidden, dtype=dtype),
        ]
    text = load_text(config.text)

    def sample(microbatch: int) -> tuple[torch.Tensor, torch.Tensor]:
        windows = torch.stack(
            [window(text, config.seq, seed=config.seed, sample=index) for index in config.samples_of(microbatch)]
        )
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    tied = [((0, "tokens.weight"), (last, "logits.weight"))] if config.tied else []
    return Model(layers=layers, sample=sample, loss=next_byte_loss, plan=shard, randomness=randomness, tied=tied)


def next_byte_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The cross entropy of logits (batch, seq, vocabulary) against bytes (batch, seq), mean over all positions."""
    return functional.cross_entropy(output.flatten(0, -2), target.flatten())


def shard(layer: nn.Module) -> dict[str, ParallelStyle]:
    """The parallel styles of a layer's modules, for tensor parallelism (Shoeybi et al., 2019).

    A block's heads and the hidden features of its MLP are cut over tp. Embedding, norms and head are replicated.
    """
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    if not isinstance(layer, Block):
        return {}
    columns = ("attention.q", "attention.k", "attention.v", "fc1")
    return {
        **{name: ColwiseParallel() for name in columns},
        **{name: RowwiseParallel() for name in ("attention.o", "fc2")},
    }
