// Draw: the timelines, with a pen that is a canvas or an SVG file.

import { inkOn, painter } from "./colours.js";
import { bytesText, digits, share, ticks, timeText, timeUnit } from "./units.js";

const LEGIBLE = 5; // pixels of a digit, about
const STRIP = 0.18; // of a lane, for what runs beside computations
const BESIDE = { UNSHARD: 0, O: STRIP, L: 1 - 2 * STRIP, REDUCE_GRAD: 1 - STRIP }; // where it stands in its lane

/** Everything that does not follow the pointer. */
export function drawAll(pen, layout, { theme, choices, state, limit }) {
  drawAxis(pen, layout, theme);
  const most = Math.max(limit ?? 0, ...layout.blocks.flatMap((each) => each.tracks.flatMap((one) => one.numbers.peak ?? [0])));
  for (const block of layout.blocks) {
    drawHeading(pen, layout, block, theme);
    for (const lane of block.lanes) {
      const label = layout.narrow ? `${lane.rank}` : `rank ${lane.rank}`;
      pen.text(layout.left - 8, lane.y + layout.bar / 2, label, theme.soft, { size: Math.min(12, layout.bar - 1), align: "right" });
    }
    pen.clip(layout.left, block.top, layout.right - layout.left, block.bottom - block.top + 2, () => {
      for (const lane of block.lanes) {
        for (const { picture, y, height } of lane.tracks) {
          const end = layout.x(picture.numbers.makespan);
          pen.rect(layout.x(0), y, end - layout.x(0), height, theme.idle);
        }
      }
      block.tracks.forEach((picture, track) => drawBars(pen, layout, block, track, { theme, choices, by: state.colours }));
      if (layout.strip) drawStrips(pen, layout, block, { theme, limit, most });
      if (state.messages && block.tracks.length === 1) drawMessages(pen, layout, block, theme);
      if (state.path) drawPath(pen, layout, block, choices.critical);
    });
  }
}

function drawAxis(pen, layout, theme) {
  const unit = timeUnit(layout.longest);
  const count = Math.max(Math.floor((layout.right - layout.left) / (layout.narrow ? 70 : 90)), 1);
  const at = ticks(layout.from * unit.factor, layout.to * unit.factor, count);
  for (const value of at) {
    const x = layout.x(value / unit.factor);
    pen.line([[x, layout.axis - 4], [x, layout.bottom + 2]], theme.line, { line: 1 });
    for (const y of [layout.axis - 14, layout.bottom + 14]) {
      const isLast = x > layout.right - 34;
      const text = `${digits(Number(value.toPrecision(6)))}${value === at.at(-1) ? ` ${unit.name}` : ""}`;
      pen.text(isLast ? layout.right : x, y, text, theme.soft, { size: 11, align: isLast ? "right" : "center" });
    }
  }
}

function drawHeading(pen, layout, block, theme) {
  const y = block.top + 15;
  const x = layout.narrow ? 2 : layout.left;
  pen.text(x, y, block.title, block.isBad ? theme.bad : theme.ink, { size: 13, weight: 600 });
  if (!layout.narrow) {
    pen.text(layout.right, y, block.note, block.isBad ? theme.bad : theme.soft, { size: 12, align: "right" });
  }
}

function drawBars(pen, layout, block, track, { theme, choices, by }) {
  const picture = block.tracks[track];
  const { start, end, rank, microbatch, stage, action } = picture.rows;
  const paint = painter(picture, choices.kinds, by);
  const shade = layout.to - layout.from;
  const perSecond = (layout.right - layout.left) / shade;
  const size = Math.min(11, block.lanes[0].tracks[track].height - 3);
  const width = String(picture.microbatches - 1).length;
  for (let row = 0; row < picture.count; row += 1) {
    if (end[row] < layout.from || start[row] > layout.to) continue;
    const place = block.lanes[rank[row]].tracks[track];
    const x = layout.x(start[row]);
    const length = (end[row] - start[row]) * perSecond;
    const gap = length > 6 ? 1 : 0; // narrow bars would pale
    const joins = row + 1 < picture.count && action[row + 1] === action[row];
    const colour = paint(row);
    pen.rect(x, place.y, Math.max(length - (joins ? 0 : gap), 0.6), place.height, colour, { radius: length > 8 ? 2 : 0 });
    if (by !== "kind" && place.height > 8) {
      pen.rect(x, place.y + place.height - 3, Math.max(length - gap, 0.6), 3, choices.kinds[picture.rows.kind[row]].colour);
    }
    const text = by === "kind" ? `${microbatch[row]}` : `${picture.letter[row]}${microbatch[row]}`;
    const digitsOf = by === "kind" ? width : width + 1;
    if (size >= 8 && length > digitsOf * (LEGIBLE + size / 8) + 3) {
      const shown = picture.chunks > 1 && length > (digitsOf + 4) * 7 ? `${stage[row]}${picture.letter[row]}${microbatch[row]}` : text;
      pen.text(x + length / 2, place.y + place.height / 2 + 0.5, shown, inkOn(colour), { size, align: "center" });
    }
  }
  const { beside } = picture;
  for (let index = 0; index < (beside?.rank.length ?? 0); index += 1) {
    if (beside.end[index] < layout.from || beside.start[index] > layout.to) continue;
    const place = block.lanes[beside.rank[index]].tracks[track];
    const x = layout.x(beside.start[index]);
    const length = Math.max(layout.x(beside.end[index]) - x, 0.6);
    const y = place.y + place.height * BESIDE[beside.kind[index]];
    pen.rect(x, y, length, place.height * STRIP, theme.paper);
    pen.rect(x, y + 0.5, Math.max(length - 1, 0.6), place.height * STRIP - 1, choices.beside[beside.kind[index]].colour);
  }
  for (const row of block.badRows ?? []) {
    const at = layout.rectangle(block, track, row);
    pen.frame(at.x + 0.5, at.y + 0.5, Math.max(at.width - 2, 2), at.height - 1, theme.bad, { line: 2.5 });
  }
}

/** The steps of what a rank holds: [time, bytes] from each change on. */
export function levels(picture, rank) {
  const rows = picture.lanes[rank];
  const steps = [[0, 0]];
  for (const row of rows) steps.push([picture.rows.effect[row], picture.rows.held[row]]);
  steps.push([picture.numbers.makespan, steps.at(-1)[1]]);
  return steps;
}

function drawStrips(pen, layout, block, { theme, limit, most }) {
  const height = (bytes) => (bytes / (most || 1)) * (layout.strip - 2);
  for (const lane of block.lanes) {
    const floor = lane.stripTop + layout.strip;
    block.tracks.forEach((picture, track) => {
      if (!picture.rows.held) return;
      const steps = levels(picture, lane.rank);
      const outline = [[layout.x(0), floor]];
      steps.forEach(([time, bytes], index) => {
        if (index) outline.push([layout.x(time), floor - height(steps[index - 1][1])]);
        outline.push([layout.x(time), floor - height(bytes)]);
      });
      outline.push([layout.x(picture.numbers.makespan), floor]);
      if (track) pen.line(outline.slice(1, -1), theme.ink, { line: 1 });
      else pen.area(outline, theme.strip);
      if (limit !== null && !track) {
        steps.slice(0, -1).forEach(([time, bytes], index) => {
          if (bytes <= limit) return;
          const x = layout.x(time);
          const width = layout.x(steps[index + 1][0]) - x;
          pen.rect(x, floor - height(bytes), Math.max(width, 1), height(bytes) - height(limit), theme.over);
        });
      }
    });
    pen.line([[layout.x(0), floor], [layout.x(block.tracks[0].numbers.makespan), floor]], theme.line);
    if (limit !== null) {
      const y = floor - height(limit);
      pen.line([[layout.x(0), y], [layout.x(block.tracks[0].numbers.makespan), y]], theme.over, { line: 1, dash: [3, 2] });
    }
  }
}

function drawMessages(pen, layout, block, theme) {
  const picture = block.tracks[0];
  const { producer, start, arrival } = picture.messages ?? { producer: [] };
  for (let index = 0; index < producer.length; index += 1) {
    if (arrival[index] < layout.from || start[index] > layout.to) continue;
    pen.line(messageLine(layout, block, picture, index), theme.ink, { line: 0.8, alpha: 0.45 });
  }
}

/** From the facing edge of the sender's bar to that of the receiver's. */
export function messageLine(layout, block, picture, index) {
  const { producer, consumer, start, arrival } = picture.messages;
  const [from, to] = [producer[index], consumer[index]].map((row) => block.lanes[picture.rows.rank[row]]);
  const isDown = to.y > from.y;
  return [
    [layout.x(start[index]), from.y + (isDown ? layout.bar : 0)],
    [layout.x(arrival[index]), to.y + (isDown ? 0 : layout.bar)],
  ];
}

function drawPath(pen, layout, block, colour) {
  const picture = block.tracks[0];
  if (!picture.critical) return;
  const { what, isWait, begin, end, rank, destination, message } = picture.critical;
  const middle = (each) => block.lanes[each].tracks[0].y + block.lanes[each].tracks[0].height * 0.8;
  for (let index = 0; index < what.length; index += 1) {
    let [y1, y2] = [middle(rank[index]), middle(rank[index])];
    if (destination[index] >= 0) {
      // A message's segments follow each other: the line leaves with the first and arrives with the last.
      let [first, last] = [index, index];
      while (first > 0 && message[first - 1] === message[index]) first -= 1;
      while (last + 1 < what.length && message[last + 1] === message[index]) last += 1;
      const span = end[last] - begin[first] || 1;
      const drop = middle(destination[index]) - y1;
      y2 = y1 + (drop * (end[index] - begin[first])) / span;
      y1 += (drop * (begin[index] - begin[first])) / span;
    }
    pen.line([[layout.x(begin[index]), y1], [layout.x(end[index]), y2]], colour, { line: 2.5, dash: isWait[index] ? [3, 2] : [] });
    const next = index + 1 < what.length ? middle(rank[index + 1]) : y2;
    if (Math.abs(next - y2) > 0.5) pen.line([[layout.x(end[index]), y2], [layout.x(end[index]), next]], colour, { line: 2.5 });
  }
}

/** What the pointer or the keyboard has marked: solid frames for what was waited for, dashed for what waits. */
export function drawMarks(pen, layout, marked, theme) {
  if (!marked) return;
  const { block, track, row, idle, picture } = marked;
  pen.clip(layout.left - 3, 0, layout.right - layout.left + 6, layout.height, () => {
    const here = layout.rectangle(block, track, row, idle);
    const centre = (at) => [Math.min(Math.max(at.x + at.width / 2, layout.left), layout.right), at.y + at.height / 2];
    const join = (other, dash) => {
      const at = layout.rectangle(block, track, other);
      frame(pen, at, theme, { line: 2, dash });
      const forward = at.x < here.x;
      const [one, two] = forward ? [at, here] : [here, at];
      pen.line(
        [[one.x + one.width, one.y + one.height / 2], [two.x, two.y + two.height / 2]],
        theme.mark, { line: 1.5, dash, alpha: 0.8 },
      );
    };
    if (row >= 0 && picture.messages) {
      for (const each of picture.waitedFor(row)) if (each.row >= 0) join(each.row, []);
      for (const each of picture.takers[row]) join(each, [3, 3]);
    }
    if (idle >= 0) {
      let last = picture.idle.action[idle] >= 0 ? picture.rowsOf[picture.idle.action[idle]][0] : -1;
      for (const each of last >= 0 ? picture.chain(last, picture.idle.begin[idle]) : []) {
        const [one, two] = [layout.rectangle(block, track, each.row), layout.rectangle(block, track, last)];
        frame(pen, one, theme, { line: 2, dash: [] });
        pen.line([[one.x + one.width, centre(one)[1]], [two.x, centre(two)[1]]], theme.mark, { line: 1.5, alpha: 0.8 });
        last = each.row;
      }
      pen.rect(here.x, here.y, here.width, here.height, theme.mark, { alpha: 0.12 });
    }
    frame(pen, here, theme, { line: 3, dash: [] });
  });
}

function frame(pen, at, theme, { line, dash }) {
  const width = Math.max(at.width - 1, 2);
  if (!dash.length) pen.frame(at.x - 0.5, at.y - 0.5, width + 1, at.height + 1, theme.paper, { line: line + 2 });
  pen.frame(at.x - 0.5, at.y - 0.5, width + 1, at.height + 1, theme.mark, { line, dash });
}

/** The line after a block's title. */
export function noteOf(picture) {
  const { makespan, bubble, peak, step } = picture.numbers;
  if (bubble === undefined) return "drawn without waiting";
  const sum = step > makespan ? `, ${timeText(step)} with reductions` : "";
  const most = peak ? `, peak ${bytesText(Math.max(...peak))}` : "";
  return `${timeText(makespan)}${sum}, bubble ${share(bubble)}${most}`;
}
