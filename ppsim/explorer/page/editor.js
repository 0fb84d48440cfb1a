// Editor: the order as text, with the cells marked that something is wrong with.

import { find, make } from "./elements.js";
import { cellsOf } from "./orders.js";
import { ownOrder } from "./state.js";

export class Editor {
  constructor(page) {
    this.page = page;
    this.area = find("csv");
    this.marks = find("csv-marks");
    this.area.addEventListener("input", () => this.read());
    this.area.addEventListener("scroll", () => this.follow());
  }

  read() {
    const text = this.area.value;
    this.page.change({ ...ownOrder(text.trim() ? text : "", this.page.copies), at: "" }, { keep: true });
  }

  follow() {
    this.marks.scrollTop = this.area.scrollTop;
    this.marks.scrollLeft = this.area.scrollLeft;
  }

  /** Show the order of the first timeline, and its problems. */
  show({ order: text, first }) {
    if (this.area.value !== text) this.area.value = text;
    const cells = cellsOf(text);
    const spans = (first?.problems ?? [])
      .flatMap((problem) => problem.places.map(([row, column]) => cells.get(`${row},${column}`)))
      .filter(Boolean)
      .sort((a, b) => a[0] - b[0]);
    const parts = [];
    let at = 0;
    for (const [begin, end] of spans) {
      if (begin < at) continue;
      parts.push(text.slice(at, begin), make("mark", {}, text.slice(begin, end)));
      at = end;
    }
    this.marks.replaceChildren(...parts, `${text.slice(at)}\n`);
    this.follow();
  }

  /** Show the cell at a row and column, and select it. */
  goTo(place) {
    if (!place) return;
    find("text").open = true;
    const span = cellsOf(this.area.value).get(`${place[0]},${place[1]}`);
    if (!span) return;
    this.area.focus();
    this.area.setSelectionRange(...span);
    const mark = [...this.marks.querySelectorAll("mark")].find((each) => each.textContent === this.area.value.slice(...span));
    if (mark) {
      this.area.scrollTop = Math.max(mark.offsetTop - 60, 0);
      this.area.scrollLeft = Math.max(mark.offsetLeft - 120, 0);
    }
  }
}
