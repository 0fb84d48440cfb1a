// Picture: a step as the server sends it, with what is looked up in it again and again.

const KINDS = "FBIWR";

export class Picture {
  constructor(document) {
    Object.assign(this, document);
    const { rank, action, kind } = this.rows;
    this.count = rank.length;
    this.lanes = Array.from({ length: this.ranks }, () => []); // the rows of each rank, in its order
    for (let row = 0; row < this.count; row += 1) this.lanes[rank[row]].push(row);
    this.rowsOf = []; // of each action
    for (let row = 0; row < this.count; row += 1) (this.rowsOf[action[row]] ??= []).push(row);
    this.rowAt = new Map(); // by spelling
    for (let row = 0; row < this.count; row += 1) this.rowAt.set(this.spell(row), row);
    const held = Array(this.ranks).fill(0); // stages met so far
    this.chunk = this.placement.map((holder) => held[holder]++);
    this.chunks = Math.max(...held);
    this.idleOf = Array.from({ length: this.ranks }, () => []);
    this.idle?.rank.forEach((each, index) => this.idleOf[each].push(index));
    this.takers = Array.from({ length: this.count }, () => []); // the rows that need a row's result
    for (let row = 0; row < this.count; row += 1) {
      for (const need of this.needsOf(row)) this.takers[need].push(row);
    }
    this.besideAt = new Map(this.beside?.name.map((name, index) => [name, index]));
    this.critical = this.critical ?? null;
    this.onPath = new Set(this.critical?.row.filter((_, index) => this.critical.what[index] === "compute"));
    this.letter = kind.map((each) => KINDS[each]);
    this.longest = Math.max(this.numbers.makespan, this.numbers.step ?? 0);
  }

  /** A row as PyTorch spells it. */
  spell(row) {
    return `${this.rows.stage[row]}${KINDS[this.rows.kind[row]]}${this.rows.microbatch[row]}`;
  }

  /** The rows whose results a row needs: of another stage, and of its own (B and I need R if there is one, else F; R needs F; W needs I). */
  needsOf(row) {
    const { stage, kind, microbatch, needs } = this.rows;
    const found = needs && needs[row] >= 0 ? [needs[row]] : [];
    const own = { B: "RF", I: "RF", W: "I", R: "F" }[KINDS[kind[row]]] ?? "";
    const before = [...own].map((each) => this.rowAt.get(`${stage[row]}${each}${microbatch[row]}`)).find((at) => at !== undefined);
    if (before !== undefined) found.push(before);
    return found;
  }

  /** The row before a row's action on its rank, or -1. */
  previous(row) {
    const first = this.rowsOf[this.rows.action[row]][0];
    return first > 0 && this.rows.rank[first - 1] === this.rows.rank[row] ? first - 1 : -1;
  }

  /** The row after a row's action on its rank, or -1. */
  next(row) {
    const last = this.rowsOf[this.rows.action[row]].at(-1);
    return last + 1 < this.count && this.rows.rank[last + 1] === this.rows.rank[row] ? last + 1 : -1;
  }

  /** Whether a row is half of an overlapped pair. */
  inPair(row) {
    return this.rowsOf[this.rows.action[row]].length === 2;
  }

  /** The row of a rank that runs at a time, or -1. */
  rowAtTime(rank, time) {
    const rows = this.lanes[rank];
    const { start, end } = this.rows;
    let low = 0;
    let high = rows.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (end[rows[middle]] > time) high = middle;
      else low = middle + 1;
    }
    return low < rows.length && start[rows[low]] <= time ? rows[low] : -1;
  }

  /** The idle span of a rank at a time, or -1. */
  idleAtTime(rank, time) {
    const found = this.idleOf[rank].find((each) => this.idle.begin[each] <= time && time < this.idle.end[each]);
    return found ?? -1;
  }

  /**
   * What the action of a row waited for: its rank's previous action, the messages and results of other ranks, and what
   * runs beside computations (row -1).
   */
  waitedFor(row) {
    const { end, needs, messageIn, awaits } = this.rows;
    const found = [];
    const before = this.previous(row);
    if (before >= 0) found.push({ row: before, there: end[before], message: -1 });
    for (const each of this.rowsOf[this.rows.action[row]]) {
      if (needs[each] < 0) continue;
      const message = messageIn[each];
      found.push({ row: needs[each], there: message >= 0 ? this.messages.arrival[message] : end[needs[each]], message });
    }
    for (const each of this.rowsOf[this.rows.action[row]]) {
      for (const index of awaits?.[each] ?? []) found.push({ row: -1, there: this.beside.end[index], message: -1, beside: index });
    }
    return found.sort((a, b) => b.there - a.there);
  }

  /** The chain of rows that a wait goes back to: each was itself waiting for the next while this one was waited for. */
  chain(row, since) {
    const found = [];
    let at = row;
    for (;;) {
      const [last] = this.waitedFor(at);
      if (!last || last.there <= since || found.length >= 64) return found;
      if (last.row === this.previous(at) || last.row < 0) return found;
      found.push(last);
      at = last.row;
      if (this.rows.start[at] <= since) return found;
    }
  }
}
