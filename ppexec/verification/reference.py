"""Reference: the same step in one process without a pipeline, and what a pipeline's tensors differ from it by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ppexec.config.config import RunConfig
from ppexec.models.batch import Batch, load_batch
from ppexec.models.load import load_model
from ppexec.models.reduction import Share, numbers_of, shares_of
from ppexec.models.shapes import BoundarySpec, unpack
from ppexec.stage.draws import LOSS, Draws
from ppexec.stage.message import message_of
from ppexec.stage.tensor_parallel import local, local_gradient
from ppexec.stage.tied import SharedWeights, build_layers
from ppexec.verification.rounding import NUDGES, allowed, nudged, sharded_roundings
from ppsim import Kind, Program
from ppsim.costs.partition import bounds

Accumulation = tuple[tuple[int, ...], ...]
"""The microbatches whose gradients are added up one after another, of each copy of the model."""


def accumulation_orders(program: Program) -> list[Accumulation]:
    """For each stage of the model the order in which gradients are added up: that of its B, or its W, on each copy."""
    orders: list[list[int]] = [[] for _ in range(program.schedule.stages)]
    for row in range(len(program.stage)):
        if program.kind[row] in (Kind.B, Kind.W):
            orders[int(program.stage[row])].append(int(program.microbatch[row]))
    size = program.schedule.model_stages
    return [tuple(map(tuple, orders[stage::size])) for stage in range(size)]


def orders_of_replicas(config: RunConfig) -> list[tuple[Accumulation, ...]]:
    """For each stage of the model, the order of each replica; as data comes in an evaluation."""
    if config.forward_only:
        every = tuple((tuple(range(count)),) for count in config.microbatches_by_replica)
        return [every] * config.pipeline.model_stages
    programs = {pipeline.microbatches: pipeline.program for pipeline in config.pipelines}
    found = {count: accumulation_orders(program) for count, program in programs.items()}
    return list(zip(*(found[count] for count in config.microbatches_by_replica), strict=True))


class Reference:
    """The whole model in this process, from the same seeds, with the batches of all replicas.

    Parameters
    ----------
    config : RunConfig
        Of the run.
    device : torch.device
        Where it computes.

    Attributes
    ----------
    layers : list of Module
        With the step's gradients, after `run`.
    batches : list of Batch
        By replica, what `run` computes with.
    outputs : list of dict
        By replica, each microbatch's output as a message, after `run`.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self._model = load_model(config)
        self._device = device
        self._config = config
        self.layers = [
            layer
            for first, last in bounds(config.layer_sizes)
            for layer in build_layers(self._model, range(first, last), seed=config.seed, device=device)
        ]
        if config.forward_only:
            self.layers = [layer.eval() for layer in self.layers]
        self._draws = Draws(config.seed)
        self._shared = SharedWeights(self.layers, self._model.tied, stage_of=config.stage_of_layers)
        self.batches = [self._load(dp_rank) for dp_rank in range(config.dp)]
        self._share()
        self.outputs: list[dict[int, torch.Tensor]] = []
        self._output_specs: list[dict[int, BoundarySpec]] = [{} for _ in self.batches]
        self._magnitudes: dict[nn.Parameter, torch.Tensor] = {}
        self._roundings = sharded_roundings(self._model, config)
        self._moved: dict[int | tuple[int, int], float] = {}

    def _load(self, dp_rank: int) -> Batch:
        config = self._config
        return load_batch(
            self._model.sample,
            seed=config.seed,
            step=0,
            microbatches=config.microbatches_by_replica,
            samples_of=config.samples_of,
            dp_rank=dp_rank,
            has_first=True,
            has_last=True,
            device=self._device,
        )

    def _share(self) -> None:
        """Let each batch know what its microbatches count."""
        reduction = self._model.reduction
        for batch in self.batches:
            batch.boundaries.extend([BoundarySpec.of(value)] for value in batch.inputs)
        numbers = [numbers_of(reduction, batch) for batch in self.batches]
        whole = sum(map(sum, numbers))
        for batch, of_batch in zip(self.batches, numbers, strict=True):
            batch.shares.extend(shares_of(reduction, of_batch, whole, len(batch.inputs)))

    def run(self, *orders: Accumulation) -> None:
        """Compute a step: forward and backward of each microbatch, one replica after the other.

        Parameters
        ----------
        *orders : Accumulation
            Sequence of each replica's microbatches, copy after copy; one for all replicas alike. The gradients of each
            copy are added up apart, and then the copies' sums.

        Notes
        -----
        The model's `reduction` says what the loss of a microbatch counts. With tp the step is computed again with every
        parameter moved by one rounding, to measure how much that changes outputs and gradients.
        """
        orders = orders * len(self.batches) if len(orders) == 1 else orders
        self._step(orders)
        if not self._roundings:
            return
        outputs, magnitudes = self.outputs, dict(self._magnitudes)
        kept = {p: (p.detach().clone(), p.grad) for layer in self.layers for p in layer.parameters()}
        self._moved.clear()
        for number in range(NUDGES):
            with torch.no_grad():
                for index, (parameter, (value, _)) in enumerate(kept.items()):
                    parameter.copy_(nudged(value, self._config.seed, number, index))
            self._step(orders)
            for layer, module in enumerate(self.layers):
                for p in module.parameters():
                    if p.grad is not None:
                        self._note(layer, p.grad - kept[p][1])  # type: ignore[operator]
            for replica, (before, after) in enumerate(zip(outputs, self.outputs, strict=True)):
                for microbatch, output in after.items():
                    specs = self._output_specs[replica][microbatch].tensors
                    for moved, still in zip(unpack(output, specs), unpack(before[microbatch], specs), strict=True):
                        self._note((replica, microbatch), moved.double() - still.double())
        for parameter, (value, gradient) in kept.items():
            parameter.data.copy_(value)
            parameter.grad = gradient
        self.outputs, self._magnitudes = outputs, magnitudes

    def _note(self, what: int | tuple[int, int], difference: torch.Tensor) -> None:
        largest = float(difference.abs().max()) if difference.numel() else 0.0
        self._moved[what] = max(self._moved.get(what, 0.0), largest)

    def output_tensors(self) -> list[list[torch.Tensor]]:
        """The tensors of each output, replica after replica, each replica's by microbatch."""
        return [
            unpack(output, self._output_specs[replica][microbatch].tensors)
            for replica, of_replica in enumerate(self.outputs)
            for microbatch, output in sorted(of_replica.items())
        ]

    def output_rounding(self, dp_rank: int, microbatch: int) -> torch.Tensor:
        """The difference that sums over tp may make to an output (see `allowed`), float64 of shape (1,)."""
        output = self.outputs[dp_rank][microbatch]
        tensors = unpack(output, self._output_specs[dp_rank][microbatch].tensors)
        floating = [tensor for tensor in tensors if tensor.is_floating_point()]
        largest = max((float(tensor.abs().max()) for tensor in floating if tensor.numel()), default=0.0)
        moved = self._moved.get((dp_rank, microbatch), 0.0)
        dtype = floating[0].dtype if floating else torch.float64
        bound = allowed(self._roundings, dtype, largest=largest, moved=moved)
        return torch.tensor([bound], dtype=torch.float64, device=output.device)

    def _step(self, orders: Sequence[Accumulation]) -> None:
        for layer in self.layers:
            layer.zero_grad(set_to_none=True)
        self._magnitudes.clear()
        self._shared.clear()
        self.outputs = [{} for _ in self.batches]
        terms = 0.0
        for replica, order in enumerate(orders):
            for number, of_copy in enumerate(order):
                aside = self._taken_gradients() if number else {}
                for microbatch in of_copy:
                    terms += self._compute(replica, microbatch)
                for parameter, gradient in aside.items():
                    parameter.grad = gradient if parameter.grad is None else gradient + parameter.grad
        if self._model.reduction == "sum" and not self._config.forward_only:
            for parameter in nn.ModuleList(self.layers).parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(terms)
            for magnitude in self._magnitudes.values():
                magnitude.div_(terms)

    def _taken_gradients(self) -> dict[nn.Parameter, torch.Tensor]:
        """The gradients so far, which the parameters no longer have."""
        found = {p: p.grad for p in nn.ModuleList(self.layers).parameters() if p.grad is not None}
        for parameter in found:
            parameter.grad = None
        return found

    def _compute(self, replica: int, microbatch: int) -> float:
        """Forward and backward of a microbatch; gives the number of terms that its loss counts."""
        config, batch, terms = self._config, self.batches[replica], 0.0
        with torch.set_grad_enabled(not config.forward_only):
            self._shared.renew()
            if self._model.randomness is not None and not config.forward_only:
                self._model.randomness.at(batch.step, batch.samples[microbatch])
            self._draws.at(batch.step, batch.samples[microbatch])
            value = _each(torch.clone, batch.inputs[microbatch])  # layers may work in place
            for first, last in bounds(config.layer_sizes):
                for index in range(first, last):
                    value = self._draws.call(index, self.layers[index], value)
                # Kernels may differ by layout, and what crosses a cut is dense.
                value = _each(torch.Tensor.contiguous, value)
            loss = self._draws.call(LOSS, self._model.loss, value, batch.targets[microbatch])
            if self._model.reduction == "sum":
                loss, number = loss
                terms = float(number)
        self._output_specs[replica][microbatch] = BoundarySpec.of(value)
        self.outputs[replica][microbatch] = message_of(value).clone()
        if loss.requires_grad:
            self._add_gradients(loss, Share(*batch.shares[microbatch]).gradient(loss))
        return terms

    def _add_gradients(self, loss: torch.Tensor, gradient: torch.Tensor) -> None:
        if self._config.dp == 1:
            loss.backward(gradient)
            return
        parameters = [p for p in nn.ModuleList(self.layers).parameters() if p.requires_grad]
        sums = {parameter: parameter.grad for parameter in parameters}
        for parameter in parameters:
            parameter.grad = None
        loss.backward(gradient)
        for parameter in parameters:
            term, total = parameter.grad, sums[parameter]
            if term is not None:
                magnitude = term.double().abs()
                self._magnitudes[parameter] = self._magnitudes.get(parameter, torch.zeros_like(magnitude)) + magnitude
            parameter.grad = term if total is None else total if term is None else total.add_(term)

    def gradient(self, layer: int, name: str) -> torch.Tensor:
        """A parameter's gradient, or zeros if no gradient reached it."""
        layer, name = self._shared.place(layer, name)
        return gradient_of(self.layers[layer].get_parameter(name))

    def rounding(self, layer: int, name: str) -> torch.Tensor:
        """The difference that another order of adding up can make to each element of a gradient.

        Parameters
        ----------
        layer : int
            Position in the chain.
        name : str
            Of the parameter in its layer.

        Returns
        -------
        Tensor of the parameter's shape
            In float64.

        Notes
        -----
        Over dp: the sum of n terms g in floating point, in any order, is off by at most (n - 1) u / (1 - (n - 1) u)
        times the sum of |g| (Higham, Accuracy and Stability of Numerical Algorithms, equation 4.4). Both sums are, the
        pipeline's and this one's. A weight that is tied over n stages has n terms for each microbatch.

        Over tp: `allowed` for all gradients of the layer as one vector. A gradient that is zero except for rounding,
        such as that of a key's bias in attention, has no magnitude of its own.
        """
        stages = self._shared.stages(layer, name)
        layer, name = self._shared.place(layer, name)
        parameter = self.layers[layer].get_parameter(name)
        every = [gradient_of(p) for p in self.layers[layer].parameters() if p.requires_grad]
        largest = max((float(gradient.abs().max()) for gradient in every if gradient.numel()), default=0.0)
        sharded = allowed(self._roundings, parameter.dtype, largest=largest, moved=self._moved.get(layer, 0.0))
        terms = self._config.step_microbatches * stages
        slips = (terms - 1) * torch.finfo(parameter.dtype).eps / 2
        magnitude = self._shared.magnitude((layer, name)) if stages > 1 else self._magnitudes.get(parameter)
        if magnitude is None:
            magnitude = torch.zeros(parameter.shape, dtype=torch.float64, device=parameter.device)
        return 2 * slips / (1 - slips) * magnitude + sharded


def _each(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """A value with every tensor changed."""
    return pytree.tree_map_only(torch.Tensor, change, value)


def gradient_of(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's slice of a parameter's gradient, or zeros if it has none."""
    gradient = local_gradient(parameter)
    return torch.zeros_like(local(parameter)) if gradient is None else gradient.detach()
