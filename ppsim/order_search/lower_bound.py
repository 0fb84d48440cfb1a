"""Lower bound: what no order can beat, proved."""

from __future__ import annotations

import math

import numpy as np

from ppsim.order_search.problem import Floats, Problem
from ppsim.schedule.action import Kind


def lower_bound_s(problem: Problem) -> float:
    """The number of seconds below which no order under the problem's limit can bring its objective.

    Notes
    -----
    The bound is the largest of several, each proved here.

    Notation. Stage s has F, I, W, B seconds. b = min(I, B) is the least time from the start of a backward to its
    input gradient; w = min(I + W, B) is the least backward work. M and M' are the bytes held from F to the backward's
    end, and from I to W. L is the rank's limit. A hop is the least time of a message. R(s) is the shortest time from
    the start of F to the start of the backward of one microbatch on s: down the stages by F and hops, back by b and
    hops. Rank r has stages s1 < ... < sv. Its first action is F on s1 and its last backward is on s1, because on one
    rank a microbatch runs its F from s1 to sv and its backwards from sv to s1.

    Work. Rank r computes at least m sum(F + w).

    Head. Between its first start and its first backward, which is on sv, r runs forwards only. Nothing is released
    meanwhile, so these forwards fit into L: at most K1 seconds of them, a knapsack. The interval is no shorter than the
    chain from F on s1 to the backward on sv. So r idles for at least the difference.

    Tail. Take the last F on sj (any j) and its microbatch b. Between this F's end and b's backward on sj lie at least
    R(sj) - F. Meanwhile r can run two things. One is what b itself still does on r. The other is what is left of
    microbatches whose F on sj is over. Each of them holds bytes when that last F starts: those of s1..si, with the work
    still to come, or M' for a W that waits. Together they hold no more than L minus what b holds: a knapsack again, K2.
    Choosing I + W where B is shorter adds at least as much to the work as it adds to K2, so the knapsack's values count
    w and w - I. The rest of the interval is idle. If all m microbatches do not fit on s1..sj at once, the last F comes
    after a backward; then head and tail do not intersect and add up. Else the larger one counts.

    Memory in time (Little's law). Each microbatch holds M on s for at least R + I and then M' for W, or M for R + B.
    The sum over stages and microbatches is at most L times r's time.

    Slots. Count the microbatches that have begun on r and not ended their backward on sv. There are never more than k
    = 1 + floor((L - M(s1) - ... - M(sv)) / M(s1)): when the first of them ends that backward it holds all its M, and
    each of the others holds at least M(s1). So the i-th F on s1 starts at f(i) >= f(i - k) + H, where H is the
    shortest time from F on s1 to the end of the backward on sv. Also f(i) >= f(i - 1) + F. Hence f(i) is at least i
    F, and at least (i mod k) F + floor(i / k) H. After the last F come R and w. With one stage, if M' does not fit
    beside k M, then i - k + 1 of the earlier ones have ended their W too, or i - k + 2 their backward: H is R +
    min(w, F + b) then, not R + b.

    Stages. From the first F on s to the start of the last backward there pass at least max(m (F + b) - b,
    R + (m - 1) max(F, b)). Before and after it come the chains from s1(a), or stage 0, to s and back, and w.

    Pairs. Take ranks a and r with s1(a) before s1(r). r starts no earlier than the forward chain from a's first
    start. r's last backward on s1 ends after all of r's work, except W that wait (a knapsack under L, K3), and after
    r's idle time above. Then come the gradient's chain back to s1(a), and w there. All of this lies between a's first
    start and its last end. The makespan is the longest such time from stage 0's start to any end.

    Overlapped pairs. Where stages communicate, a pair may be shorter than its parts alone, but is no shorter than their
    compute, one after the other, and no shorter than their communication. So any order is as long as it would be with
    compute alone and without pairs, and as long as with communication alone. The bound is the larger of these two.
    """
    return max(_without_pairs_s(each) for each in without_overlap(problem))


def without_overlap(problem: Problem) -> tuple[Problem, ...]:
    """Problems without overlapped pairs whose objectives are no larger in any order: see `lower_bound_s`.

    Returns
    -------
    tuple of Problem
        The problem itself where stages do not communicate; else one with their compute, one with their communication.
    """
    communication_s = problem.tables.communication_s
    if not communication_s.any():
        return (problem,)
    return problem.with_durations(problem.tables.duration_s - communication_s), problem.with_durations(communication_s)


def _without_pairs_s(problem: Problem) -> float:
    """The bound of orders without overlapped pairs."""
    chain = Chains(problem)
    ranks = sorted((_Rank(problem, chain, rank) for rank in range(problem.ranks)), key=lambda rank: rank.stages[0])
    first = np.array([rank.stages[0] for rank in ranks])
    own = np.array([rank.time_s for rank in ranks])
    turned = chain.ahead[first] + np.array([rank.until_last_backward_s for rank in ranks])
    # by way of rank r: from stage 0's first start to the backward on stage 0 of the last microbatch that left r
    way = turned + chain.back[first] - chain.least[first]
    if problem.by_rank_time:
        farthest = np.maximum.accumulate(way[::-1])[::-1]
        one = first[:-1]
        pairs = farthest[1:] - chain.ahead[one] - chain.back[one] + chain.work[one]
        return float(max(own.max(), *(chain.by_stage(int(stage)) for stage in first), pairs.max(initial=0.0)))
    ends = np.maximum.accumulate(chain.work - chain.back)  # at best, from `way` to the end of the stages up to this
    pairs = way[1:] + ends[first[1:] - 1]
    starts = chain.ahead[first] + own
    return float(max(starts.max(), turned.max(), chain.by_stage(0, to_any_end=True), pairs.max(initial=0.0)))


class Chains:
    """The shortest chains of one microbatch through the stages, in seconds, shape (S,) each; R, b and w as above.

    Parameters
    ----------
    problem : Problem

    Attributes
    ----------
    ahead, back
        From the start of F on stage 0 to that on s, and from the start of the backward on s to that on stage 0.
    turn : float
        From the start of F on stage 0 to the start of its backward there.
    round_trip, least, work
        R, b and w.
    busy
        From the start of the first F on s to the start of its last backward.
    """

    def __init__(self, problem: Problem) -> None:
        tables = problem.tables
        least = np.minimum(tables.duration_s[Kind.I], tables.duration_s[Kind.B])
        hop_ahead, hop_back = tables.occupied_s + tables.latency_s
        self.least = least
        self.ahead = np.concatenate([[0.0], np.cumsum(tables.duration_s[Kind.F][:-1] + hop_ahead[:-1])])
        self.back = np.concatenate([[0.0], np.cumsum(least[1:] + hop_back[1:])])
        self.work = np.minimum(tables.duration_s[Kind.I] + tables.duration_s[Kind.W], tables.duration_s[Kind.B])
        self.turn = self.ahead[-1] + tables.duration_s[Kind.F][-1] + self.back[-1]
        self.round_trip = self.turn - self.ahead - self.back
        forward, m = tables.duration_s[Kind.F], problem.microbatches
        self.busy = np.maximum(m * (forward + least) - least, self.round_trip + (m - 1) * np.maximum(forward, least))

    def by_stage(self, first: int, *, to_any_end: bool = False) -> float:
        """The least time from the first F on a stage to the last end, by way of the slowest stage from there on.

        Parameters
        ----------
        first : int
            The stage.
        to_any_end : bool
            Whether the last end is that of any stage, not of stage `first`.

        Returns
        -------
        float
            Seconds.
        """
        after = self.work - self.back
        last = np.maximum.accumulate(after)[first:] if to_any_end else after[first]
        return float((self.ahead[first:] - self.ahead[first] + self.busy[first:] + self.back[first:] + last).max())


def _numbers(array: Floats) -> list[float]:
    """The array as Python's numbers, with which single sums are faster."""
    numbers: list[float] = array.tolist()
    return numbers


class _Rank:
    """What bounds one rank; `time_s` from its first start to its last end."""

    def __init__(self, problem: Problem, chain: Chains, rank: int) -> None:
        self.stages = problem.stages_of(rank)
        tables, index = problem.tables, np.array(self.stages)
        self.microbatches = problem.microbatches
        self.limit = int(problem.limit_bytes[rank])
        self.forward, self.full, self.input, self.weight = (
            _numbers(tables.duration_s[kind][index]) for kind in (Kind.F, Kind.B, Kind.I, Kind.W)
        )
        self.least, self.work = _numbers(chain.least[index]), _numbers(chain.work[index])
        self.held: list[int] = tables.held_bytes[index].tolist()
        self.kept: list[int] = tables.kept_bytes[index].tolist()
        self.round_trip = _numbers(chain.round_trip[index])
        self.first_trip = float(chain.turn - chain.ahead[index[0]] - chain.back[index[-1]])
        work_s = self.microbatches * (math.fsum(self.forward) + math.fsum(self.work))
        idle_s = self._idle()
        last_trip_s = self._last_start_s() + self.round_trip[0]
        self.time_s = max(work_s + idle_s, self._memory_in_time(), last_trip_s + self.work[0])
        waiting_s = self._knapsack(self.limit, self._waiting_weights())
        self.until_last_backward_s = max(work_s + idle_s - waiting_s, last_trip_s + self.least[0])

    def _waiting_weights(self) -> list[tuple[int, float]]:
        """The knapsack's items for W that wait, by stage: bytes held and seconds of work."""
        return [
            (kept, max(0.0, work - input_s))
            for kept, work, input_s in zip(self.kept, self.work, self.input, strict=True)
        ]

    def _knapsack(self, capacity: int, items: list[tuple[int, float]]) -> float:
        """The most value that fits the capacity in bytes, each item (bytes, seconds) at most m times.

        Bounded from above by allowing fractions of items (Dantzig, 1957). The capacity is first rounded down to what
        the sizes can add up to: multiples of their common divisor.
        """
        useful = [(size, value) for size, value in items if value > 0]
        total = self.microbatches * math.fsum(value for size, value in useful if size == 0)
        sized = sorted((item for item in useful if item[0] > 0), key=lambda item: item[1] / item[0], reverse=True)
        if not sized:
            return total
        divisor = math.gcd(*(size for size, _ in sized))
        room = float(max(0, capacity) // divisor * divisor)
        for size, value in sized:
            count = min(float(self.microbatches), room / size)
            total += count * value
            room -= count * size
            if room <= 0:
                break
        return total

    def _idle(self) -> float:
        """Head and tail: how long the rank idles at least before its last backward."""
        last = len(self.stages) - 1
        forwards = self._knapsack(self.limit, list(zip(self.held, self.forward, strict=True)))
        head = max(0.0, self.first_trip - forwards)
        best = head
        for j in range(last + 1):
            own_held = sum(self.held[: j + 1])
            own_work = math.fsum(self.forward[j + 1 :]) + math.fsum(self.work[j + 1 :])
            items = self._waiting_weights()
            for i in range(j, last + 1):  # forwards done up to the i-th stage
                items.append((sum(self.held[: i + 1]), math.fsum(self.forward[i + 1 :]) + math.fsum(self.work)))
            for i in range(last + 1):  # backwards left on the stages up to the i-th
                items.append((sum(self.held[: i + 1]), math.fsum(self.work[: i + 1])))
            meanwhile = self._knapsack(self.limit - own_held, items)
            tail = max(0.0, self.round_trip[j] - self.forward[j] - own_work - meanwhile)
            apart = self.microbatches * own_held > self.limit
            best = max(best, head + tail if apart else max(head, tail))
        return best

    def _memory_in_time(self) -> float:
        """Memory in time: bytes times seconds that must be held, over the limit."""
        sizes = [size for size in self.held + self.kept if size > 0]
        if not sizes:
            return 0.0
        divisor = math.gcd(*sizes)
        if self.limit < divisor:
            return 0.0
        byte_seconds = math.fsum(
            min(held * (trip + input_s) + kept * weight_s, held * (trip + full_s))
            for held, kept, trip, input_s, weight_s, full_s in zip(
                self.held, self.kept, self.round_trip, self.input, self.weight, self.full, strict=True
            )
        )
        return self.microbatches * byte_seconds / (self.limit // divisor * divisor)

    def _last_start_s(self) -> float:
        """Slots: from the first start of F on s1 to the last, at least."""
        apart = (self.microbatches - 1) * self.forward[0]
        if self.held[0] == 0:
            return apart
        slots = 1 + (self.limit - sum(self.held)) // self.held[0]
        released = self.least[-1]
        if len(self.stages) == 1 and self.limit - slots * self.held[0] < self.kept[0]:
            released = min(self.work[0], self.forward[0] + self.least[0])
        rounds, rest = divmod(self.microbatches - 1, slots)
        return max(apart, rest * self.forward[0] + rounds * (self.first_trip + released))
