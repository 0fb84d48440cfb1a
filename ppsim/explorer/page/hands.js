// Hands: what pointer and keys do to the timelines.

import { cardOf } from "./card.js";
import { theme } from "./colours.js";
import { find, make } from "./elements.js";
import { moved, placeAt, placeOf } from "./orders.js";
import { ownOrder, question } from "./state.js";
import { share, timeText } from "./units.js";

const STILL = 4; // pixels that a press may move and still be a click

export class Hands {
  constructor(page) {
    this.page = page;
    this.box = find("timeline");
    this.card = find("card");
    this.press = null;
    this.box.addEventListener("pointermove", (event) => this.move(event));
    this.box.addEventListener("pointerleave", () => this.press || this.hover(null));
    this.box.addEventListener("pointerdown", (event) => this.down(event));
    this.box.addEventListener("pointerup", (event) => this.up(event));
    this.box.addEventListener("pointercancel", () => this.letGo());
    this.box.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    this.box.addEventListener("keydown", (event) => this.key(event));
    this.box.addEventListener("blur", () => this.hover(null));
    find("zoom-in").addEventListener("click", () => this.zoom(0.5));
    find("zoom-out").addEventListener("click", () => this.zoom(2));
    find("zoom-all").addEventListener("click", () => page.change({ from: "", to: "" }));
    document.addEventListener("scroll", () => { if (!this.press) this.hover(null); }, { passive: true });
  }

  point(event) {
    const at = this.box.getBoundingClientRect();
    return [event.clientX - at.left, event.clientY - at.top];
  }

  move(event) {
    const { layout } = this.page;
    if (!layout) return;
    const [x, y] = this.point(event);
    if (this.press) this.drag(event, x, y);
    else {
      const hit = layout.hit(x, y);
      this.box.style.cursor = y < layout.axis || y > layout.bottom ? "ew-resize" : hit?.row >= 0 && hit.block.editable && hit.track === 0 ? "grab" : "default";
      this.hover(hit, event.clientX, event.clientY);
    }
  }

  hover(hit, x, y) {
    const { page } = this;
    const old = page.hover;
    const isSame = hit && old && hit.block === old.block && hit.track === old.track && hit.row === old.row && hit.idle === old.idle;
    if (!isSame && (hit || old)) {
      page.hover = hit;
      page.drawMarked();
      this.card.hidden = !hit;
      if (hit) this.card.replaceChildren(...cardOf(hit, page.choices));
    }
    if (hit) this.placeCard(x, y);
  }

  placeCard(x, y) {
    const { width, height } = this.card.getBoundingClientRect();
    const left = x + 18 + width > window.innerWidth ? x - 18 - width : x + 18;
    const top = y + 18 + height > window.innerHeight ? Math.max(y - 18 - height, 4) : y + 18;
    Object.assign(this.card.style, { left: `${Math.max(left, 4)}px`, top: `${top}px` });
  }

  down(event) {
    if (event.button !== 0) return;
    const { layout } = this.page;
    const [x, y] = this.point(event);
    const isAxis = y < layout.axis || y > layout.bottom;
    this.press = { x, y, from: layout.from, to: layout.to, hit: isAxis ? null : layout.hit(x, y), isAxis, isDrag: false };
    this.box.setPointerCapture(event.pointerId);
  }

  drag(event, x, y) {
    const { press, page } = this;
    const { layout } = page;
    if (!press.isDrag && Math.hypot(x - press.x, y - press.y) < STILL) return;
    press.isDrag = true;
    if (press.isAxis) {
      const shift = ((press.x - x) / (layout.right - layout.left)) * (press.to - press.from);
      this.look(press.from + shift, press.to + shift);
      return;
    }
    const { hit } = press;
    if (!(hit?.row >= 0) || !hit.block.editable || hit.track !== 0) return;
    this.box.classList.add("dragging");
    const place = placeAt(hit.picture, hit.rank, layout.time(x));
    if (place !== press.place) {
      press.place = place;
      this.preview(hit, place, event.clientX, event.clientY);
    }
    this.placeCard(event.clientX, event.clientY);
    page.hover = null;
    page.drawMarked((pen) => this.drawDrag(pen, hit, place, x));
  }

  /** The bar under the pointer, and a line where it would go. */
  drawDrag(pen, hit, place, x) {
    const { layout } = this.page;
    const { picture, block, rank, row } = hit;
    const bar = layout.rectangle(block, 0, row);
    const lane = block.lanes[rank];
    const actions = picture.lanes[rank];
    const first = picture.rows.action[actions[0]];
    const before = picture.rowsOf[first + place]?.[0];
    const inOrder = before !== undefined && picture.rows.rank[before] === rank;
    const at = layout.x(inOrder ? picture.rows.start[before] : picture.rows.end[actions.at(-1)]);
    const colours = theme();
    pen.rect(bar.x, bar.y, bar.width, bar.height, colours.paper, { alpha: 0.6 });
    pen.frame(x - bar.width / 2, lane.y - 2, bar.width, layout.bar + 4, colours.mark, { line: 2 });
    pen.line([[at, lane.y - 5], [at, lane.y + layout.bar + 5]], colours.mark, { line: 3 });
  }

  /** Say at once what would become of the step. */
  async preview(hit, place, x, y) {
    const { page, press } = this;
    const from = placeOf(hit.picture, hit.row);
    const name = hit.picture.spell(hit.row);
    const say = (...parts) => {
      this.card.hidden = false;
      this.card.replaceChildren(make("h3", {}, `${name} on rank ${hit.rank}`), ...parts);
      this.placeCard(x, y);
    };
    if (place === from || place === from + 1) return say(make("p", { class: "quiet" }, "stays where it is"));
    const csv = moved(page.order, hit.rank, from, place);
    const answer = await page.ask(question({ ...page.state, ...ownOrder(csv, page.copies) })).catch(() => null);
    if (this.press !== press || press.place !== place || !answer) return undefined;
    if (answer.problems) {
      const shown = answer.problems.slice(0, 3).map((each) => make("p", { class: "bad" }, each.message));
      const rest = answer.problems.length - shown.length;
      return say(...shown, rest > 0 ? make("p", { class: "bad" }, `and ${rest} more`) : "");
    }
    const { makespan, bubble } = answer.picture.numbers;
    const now = page.first.picture.numbers.makespan;
    const change = page.first.problems ? "" : Math.abs(makespan / now - 1) < 5e-5 ? ", as long as now" : `, ${makespan < now ? "−" : "+"}${(100 * Math.abs(makespan / now - 1)).toFixed(1)} %`;
    return say(make("p", {}, `step ${timeText(makespan)}${change}`), make("p", { class: "quiet" }, `bubble ${share(bubble)}`));
  }

  up() {
    const { press } = this;
    this.letGo();
    if (!press) return;
    const { hit } = press;
    if (!press.isDrag) {
      this.pin(hit);
      return;
    }
    if (press.isAxis || press.place === undefined) return;
    this.relocate(hit, press.place);
  }

  letGo() {
    this.press = null;
    this.box.classList.remove("dragging");
    this.card.hidden = true;
    this.page.drawMarked();
  }

  /** Put an action at another place of its rank's order. */
  relocate(hit, place) {
    const from = placeOf(hit.picture, hit.row);
    if (place === from || place === from + 1) return;
    const rows = hit.picture.rowsOf[hit.picture.rows.action[hit.row]];
    const target = place > from ? place - 1 : place;
    const first = hit.picture.lanes[hit.rank][0];
    // Its row in the new order, so that it stays marked: the rows of the actions that stand before it then.
    const actions = [...new Set(hit.picture.lanes[hit.rank].map((row) => hit.picture.rows.action[row]))];
    actions.splice(from, 1);
    const before = actions.slice(0, target).reduce((sum, action) => sum + hit.picture.rowsOf[action].length, 0);
    const row = first + before + rows.indexOf(hit.row);
    const csv = moved(this.page.order, hit.rank, from, place);
    this.page.change({ ...ownOrder(csv, this.page.copies), at: `first:0:${row}` });
  }

  pin(hit) {
    const { page } = this;
    this.box.focus({ preventScroll: true });
    const at = hit ? `${hit.block.key}:${hit.track}:${hit.row >= 0 ? hit.row : `i${hit.idle}`}` : "";
    page.change({ at }, { keep: true }).then(() => hit && this.showPinned());
  }

  /** The card of what is marked by click or key, beside its bar. */
  showPinned() {
    const { page } = this;
    const { pinned, layout } = page;
    if (!pinned) return;
    const bar = layout.rectangle(pinned.block, pinned.track, pinned.row, pinned.idle);
    const box = this.box.getBoundingClientRect();
    this.card.replaceChildren(...cardOf(pinned, page.choices));
    this.card.hidden = false;
    this.placeCard(box.left + Math.min(Math.max(bar.x + bar.width / 2, layout.left), layout.right), box.top + bar.y + bar.height);
  }

  look(from, to) {
    const { longest } = this.page.layout;
    const length = Math.min(to - from, longest * 1.005);
    const begin = Math.min(Math.max(from, 0), longest * 1.005 - length);
    const isAll = length >= longest * 1.0049;
    const text = (value) => String(Number(value.toPrecision(6)));
    this.page.state.from = isAll ? "" : text(begin);
    this.page.state.to = isAll ? "" : text(begin + length);
    this.page.draw();
    clearTimeout(this.later);
    this.later = setTimeout(() => this.page.change({}, { keep: true }), 200);
  }

  zoom(factor, x = null) {
    const { layout } = this.page;
    const pinned = this.page.pinned;
    let centre = x === null ? (layout.from + layout.to) / 2 : layout.time(x);
    if (x === null && pinned) {
      const bar = layout.rectangle(pinned.block, pinned.track, pinned.row, pinned.idle);
      centre = layout.time(bar.x + bar.width / 2);
    }
    this.look(centre + (layout.from - centre) * factor, centre + (layout.to - centre) * factor);
  }

  wheel(event) {
    const { layout } = this.page;
    if (event.ctrlKey || event.metaKey) {
      event.preventDefault();
      this.zoom(2 ** (event.deltaY / 200), this.point(event)[0]);
    } else if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
      event.preventDefault();
      const shift = ((event.deltaX || event.deltaY) / (layout.right - layout.left)) * (layout.to - layout.from);
      this.look(layout.from + shift, layout.to + shift);
    }
  }

  key(event) {
    const { page } = this;
    const { layout, state } = page;
    if (event.ctrlKey || event.metaKey || !layout?.blocks.length) return;
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (step) {
      event.preventDefault();
      if (event.altKey) this.shift(step[0]);
      else if (event.shiftKey && step[0]) {
        const length = (layout.to - layout.from) / 8;
        this.look(layout.from + step[0] * length, layout.to + step[0] * length);
      } else this.walk(...step);
      return;
    }
    const does = {
      "+": () => this.zoom(0.5), "=": () => this.zoom(0.5), "-": () => this.zoom(2),
      0: () => page.change({ from: "", to: "" }),
      c: () => page.change({ path: !state.path }), m: () => page.change({ memory: !state.memory }),
      Escape: () => { page.change({ at: "" }, { keep: true }); this.hover(null); this.card.hidden = true; },
    }[event.key];
    if (does && !event.altKey) {
      event.preventDefault();
      does();
    }
  }

  /** Mark the next action or idle span on the rank, or the one of another rank at the same time. */
  walk(along, across) {
    const { layout, pinned } = this.page;
    if (!pinned) {
      const block = layout.blocks[0];
      const row = block.tracks[0].lanes.find((rows) => rows.length)[0];
      this.pin({ block, track: 0, picture: block.tracks[0], rank: block.tracks[0].rows.rank[row], row, idle: -1 });
      return;
    }
    const { block, track, picture, rank, row, idle } = pinned;
    const spanOf = (each) => (each.row >= 0 ? [picture.rows.start[each.row], picture.rows.end[each.row]] : [picture.idle.begin[each.idle], picture.idle.end[each.idle]]);
    if (along) {
      const items = [
        ...picture.lanes[rank].map((each) => ({ row: each, idle: -1 })),
        ...picture.idleOf[rank].map((each) => ({ row: -1, idle: each })),
      ].sort((a, b) => spanOf(a)[0] - spanOf(b)[0]);
      const here = items.findIndex((each) => each.row === row && each.idle === idle);
      const next = items[here + along];
      if (next) this.pin({ block, track, picture, rank, ...next });
      return;
    }
    const [begin, end] = spanOf(pinned);
    const lanes = layout.blocks.flatMap((each) => each.lanes.map((lane) => ({ block: each, lane })));
    const at = lanes.findIndex((each) => each.block === block && each.lane.rank === rank) + across;
    if (!lanes[at]) return;
    const other = lanes[at].block;
    const its = other.tracks[Math.min(track, other.tracks.length - 1)];
    const time = (begin + end) / 2;
    const found = its.rowAtTime(lanes[at].lane.rank, time);
    const gap = found < 0 ? its.idleAtTime(lanes[at].lane.rank, time) : -1;
    const last = its.lanes[lanes[at].lane.rank].at(-1);
    const next = found >= 0 || gap >= 0 ? { row: found, idle: gap } : { row: last, idle: -1 };
    if (next.row === undefined) return;
    this.pin({ block: other, track: other.tracks.indexOf(its), picture: its, rank: lanes[at].lane.rank, ...next });
  }

  /** Move the marked action by one place. */
  shift(by) {
    const { pinned } = this.page;
    if (!by || !(pinned?.row >= 0) || !pinned.block.editable || pinned.track !== 0) return;
    const from = placeOf(pinned.picture, pinned.row);
    const count = new Set(pinned.picture.lanes[pinned.rank].map((row) => pinned.picture.rows.action[row])).size;
    const place = by < 0 ? from - 1 : from + 2;
    if (place >= 0 && place <= count) this.relocate(pinned, place);
  }
}
