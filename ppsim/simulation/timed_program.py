"""Load: what an engine is given to run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ppsim.schedule.program import Program
from ppsim.simulation.sharing import Devices

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Load:
    """A program that can end, and what its rows and messages take.

    duration_s: of each row, shape (rows,). dispatch_s, send_s: what a rank spends before each action once it could
    start, and after it until its messages set off, shape (actions,). occupied_s, latency_s: how long each message keeps
    its link and how much later it arrives, shape (messages,). receive_window: receives that are posted ahead on each
    link; None if a receive is always there. devices: what the ranks share; None if each computes by itself.
    """

    program: Program
    duration_s: Seconds
    dispatch_s: Seconds
    send_s: Seconds
    occupied_s: Seconds
    latency_s: Seconds
    receive_window: int | None = None
    devices: Devices | None = None

    def posts(self) -> npt.NDArray[np.int32]:
        """The message whose receive is posted when each one is used, shape (messages,); -1 for none.

        A receiver posts its receives in the order in which the link carries them, the first `receive_window` of them
        before the step and one more at each use; it may use them in another order.
        """
        messages = self.program.messages
        posted = np.full(len(messages), -1, np.int32)
        if self.receive_window is None:
            return posted
        used = np.lexsort((messages.consumer, messages.link))  # a link's messages stand side by side
        later = np.arange(len(messages)) + self.receive_window
        same_link = later < len(messages)
        same_link[same_link] = messages.link[later[same_link]] == messages.link[used[same_link]]
        posted[used[same_link]] = later[same_link]
        return posted

    def receives(self) -> tuple[npt.NDArray[np.int32], Seconds]:
        """`posts`, and when each receive is posted as far as is known before the step (0, else NaN), shape (messages,).

        Both empty where a receive is always there.
        """
        if self.receive_window is None:
            return np.zeros(0, np.int32), np.zeros(0)
        return self.posts(), np.where(self.program.messages.position < self.receive_window, 0.0, np.nan)
