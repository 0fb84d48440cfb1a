"""What ppsim estimates from shapes alone is what the executor's own GPT has and keeps."""

from __future__ import annotations

import pytest

from ppexec import Session, WorkerPool
from ppsim import Device, Transformer, estimate_costs
from tests.support.remote import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 2 x ranks")

_BYTES = ("parameter_bytes", "activation_bytes", "weight_activation_bytes", "output_bytes")


@pytest.mark.parametrize("vocabulary", [256, 300])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_the_bytes_of_every_layer_are_those_profiled(schedule: str, vocabulary: int, pool: WorkerPool) -> None:
    config = tiny(
        model="gpt", layers=2, hidden=24, heads=4, seq=7, micro_batch_size=3, vocabulary=vocabulary, schedule=schedule
    )
    with Session(config, pool=pool) as session:
        profiled = session.profile(1).layers
    model = Transformer.gpt(layers=2, hidden=24, heads=4, vocabulary=vocabulary, positions=7, tied=False)
    device = Device(flops_per_s=1e9, bytes_per_s=1e9)
    estimated = estimate_costs(model, device, micro_batch_size=3, seq=7, dtype_bytes=4)
    for mine, theirs in zip(estimated, profiled, strict=True):
        for name in _BYTES:
            assert getattr(mine, name) == getattr(theirs, name), (theirs.name, name)
