"""SM groups: who gets which multiprocessors, on a driver made up for the test: no GPU is needed to share one out."""

from __future__ import annotations

import enum
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from ppexec.machine.sm_groups import SMGroups

GPU = torch.device("cuda", 0)


class Answer(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_NOT_SUPPORTED = 801


class Kind(enum.IntEnum):
    CU_DEV_RESOURCE_TYPE_INVALID = 0
    CU_DEV_RESOURCE_TYPE_SM = 1


class Driver(ModuleType):
    """Multiprocessors in groups of 8, as on Hopper. refuses: the size of groups that get no context."""

    CUdevResourceType = Kind
    CUgreenCtxCreate_flags = SimpleNamespace(CU_GREEN_CTX_DEFAULT_STREAM=1)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)

    def __init__(self, total: int, refuses: int | None = None) -> None:
        super().__init__("driver")
        self.total, self.refuses = total, refuses
        self.contexts: list[int] = []
        self.destroyed = 0
        self.size_of_stream: dict[int, int] = {}

    def group(self, size: int) -> Any:
        return SimpleNamespace(type=Kind(int(size > 0)), sm=SimpleNamespace(smCount=size))

    def cuDeviceGet(self, index: int) -> Any:
        return Answer.CUDA_SUCCESS, index

    def cuDeviceGetDevResource(self, device: int, kind: Kind) -> Any:
        return Answer.CUDA_SUCCESS, self.group(self.total)

    def cuDevSmResourceSplitByCount(self, parts: int, every: Any, flags: int, each: int) -> Any:
        found = min(parts, every.sm.smCount // each)
        return Answer.CUDA_SUCCESS, [self.group(each)] * found, found, self.group(every.sm.smCount - found * each)

    def cuDevResourceGenerateDesc(self, groups: list[Any], count: int) -> Any:
        return Answer.CUDA_SUCCESS, groups[0]

    def cuGreenCtxCreate(self, group: Any, device: int, flags: int) -> Any:
        if group.sm.smCount == self.refuses:
            return Answer.CUDA_ERROR_NOT_SUPPORTED, None
        self.contexts.append(group.sm.smCount)
        return Answer.CUDA_SUCCESS, len(self.contexts) - 1

    def cuGreenCtxStreamCreate(self, context: int, flags: int, priority: int) -> Any:
        number = len(self.size_of_stream) + 1
        self.size_of_stream[number] = self.contexts[context]
        return Answer.CUDA_SUCCESS, number

    def cuGreenCtxDestroy(self, context: int) -> Any:
        self.destroyed += 1
        return (Answer.CUDA_SUCCESS,)


@pytest.fixture
def with_driver(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put a driver where the real one would be; streams are their numbers, and "plain" is one of no group."""

    def use(driver: Driver | None, total: int = 132) -> None:
        bindings = ModuleType("cuda.bindings")
        if driver is not None:
            bindings.driver = driver  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
        monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
        properties = SimpleNamespace(multi_processor_count=total)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "ExternalStream", lambda number, device: number)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: "plain")
        monkeypatch.setattr(torch, "zeros", lambda *shape, device: None)

    return use


@pytest.mark.parametrize(("parts", "each"), [(2, 32), (4, 16), (8, 8), (16, 8)])
def test_parts_share_half_of_the_multiprocessors(with_driver: Any, parts: int, each: int) -> None:
    """With all of them at work a GPU reaches its power limit, and the ranks slow one another down."""
    driver = Driver(132)
    with_driver(driver)
    groups = SMGroups(GPU, parts)
    assert [driver.size_of_stream[stream] for stream in groups.streams] == [each] * parts
    assert groups.description == {"multiprocessors": 132, "parts": parts, "each": [each] * parts}
    groups.close()
    assert driver.destroyed == parts


@pytest.mark.parametrize(
    ("driver", "parts", "why"),
    [
        (None, 4, "ImportError"),
        (Driver(132, refuses=16), 4, "CUDA_ERROR_NOT_SUPPORTED"),
        (Driver(16), 4, "16 multiprocessors give 2 groups of 8, not 4"),
    ],
    ids=["no bindings", "no contexts", "too few"],
)
def test_everything_falls_back_to_plain_streams_and_says_why(
    with_driver: Any, driver: Driver | None, parts: int, why: str
) -> None:
    with_driver(driver, 132 if driver is None else driver.total)
    groups = SMGroups(GPU, parts)
    assert groups.streams == ["plain"] * parts
    assert groups.description["each"] is None
    assert why in groups.description["why_not"]
