"""Model: what a pipeline trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from ppexec.models.dropout import Randomness

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle

Sample = Callable[[int], tuple[Any, Any]]
Loss = Callable[[Any, Any], Any]
Place = tuple[int, str]


@dataclass(frozen=True, kw_only=True)
class Model:
    """A chain of layers with its data and its loss.

    Parameters
    ----------
    layers : sequence of Module
        Each takes the value that the layer before it gave, as one argument, and gives one value: a tensor, or a tuple,
        list, dict or dataclass of tensors. Only floating tensors have gradients; masks, positions and other integers
        are handed on without. Layers may be on the meta device: then every rank makes only its own layers real, and
        each module that owns a parameter needs `reset_parameters()`.
    sample : callable
        Global microbatch index to (inputs, targets), two such values.
    loss : callable
        (output, target) of one microbatch to a scalar tensor: their mean or sum, as `reduction` says.
    plan : callable, optional
        How a layer is sharded over tp: the layer to the parallel styles of its modules by name, as
        `torch.distributed.tensor.parallel.parallelize_module` takes them. A layer with none is replicated.
    randomness : Randomness, optional
        Tells the layers' dropout which step and samples it computes.
    tied : sequence of sequences of (layer, parameter name)
        Places that are one weight, two or more. The first in the chain gives its value and says whether it is trained.
        Each place gets the sum of all gradients. Layers that share a module or a parameter are tied without being
        listed here.
    held_out : callable, optional
        As `sample`, for the evaluations in a training. Without it they read `sample` from microbatch 2**40 on.
    reduction : "mean", callable or "sum"
        How the losses of all microbatches and replicas make the loss of a step.

        - "mean": `loss` is a mean over samples. The step's loss is the mean over all samples: each microbatch counts
          by the first dimension of its first input tensor.
        - A callable that takes the targets of a microbatch and gives a number of terms, such as valid tokens: `loss`
          is a sum. The step's loss is the sum over all microbatches, divided by the number of all terms.
        - "sum": `loss` gives (sum, number of terms), since the number is known only after the forward. Gradients are
          added up as they are, and divided at the end of the step.

    Examples
    --------
    A factory for `--model module:factory`:

    >>> from ppexec import RunConfig
    >>> def factory(config):
    ...     layers = [nn.Linear(config.hidden, config.hidden) for _ in range(config.layers)]
    ...     def sample(microbatch):
    ...         inputs = torch.full((config.micro_batch_size, config.hidden), float(microbatch))
    ...         return inputs, inputs
    ...     return Model(layers=layers, sample=sample, loss=nn.functional.mse_loss)
    >>> len(factory(RunConfig(layers=4, hidden=8)).layers)
    4
    """

    layers: Sequence[nn.Module]
    sample: Sample
    loss: Loss
    plan: Callable[[nn.Module], dict[str, ParallelStyle]] | None = None
    randomness: Randomness | None = None
    tied: Sequence[Sequence[Place]] = ()
    held_out: Sample | None = None
    reduction: Literal["mean", "sum"] | Callable[[Any], float] = "mean"
