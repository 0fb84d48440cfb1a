// Orders: a schedule's text, and a change of one of its actions. Rows of the text are ranks.

const COMPUTES = /^(\(.*\)OVERLAP_F_B|\d+(F|BW|B|I|W|R)\d+)$/;
const PARTS = /(\d+)(F|BW|B|I|W|R)(\d+)/g;
const POST = /^(\d+)(SEND|RECV)_([FBO])(\d+)$/;
const OFFLOAD = /^(\d+)O(\d+)$/;

/** Whether a cell of the text is a computation; others are empty, communication, or concern a stage as a whole. */
export const computes = (cell) => COMPUTES.test(cell.trim());

/**
 * The text with an action moved to another place among those that its rank computes. The receives right before it and
 * the sends right after it that are its own go along, and so does its O; all else stays. `to` counts before the action is taken out.
 */
export function moved(text, rank, from, to) {
  const lines = text.split(/\r\n|\r|\n/);
  const units = unitsOf(lines[rank]);
  const actions = units.filter((each) => each.serves);
  const action = actions[from];
  const before = actions.slice(0, to).filter((each) => each !== action).at(-1);
  const rest = units.filter((each) => each !== action);
  // Right behind the action before it: an L that stands in between is for the action after it.
  const at = before ? rest.indexOf(before) + 1 : rest.findIndex((each) => each.serves);
  rest.splice(at, 0, action);
  lines[rank] = rest.flatMap((each) => each.cells).join(",");
  return lines.join("\n");
}

/** A row's cells, each action together with its own posts beside it: { cells, serves: names of messages, or null }. */
function unitsOf(line) {
  const units = [];
  for (const cell of line.split(",").map((each) => each.trim()).filter(Boolean)) {
    const [, stage, way, kind, microbatch] = POST.exec(cell.replace(OFFLOAD, "$1SEND_O$2")) ?? [];
    const message = way && `${way}_${stage}${kind}${microbatch}`;
    if (way === "SEND" && units.at(-1)?.serves?.has(message)) {
      units.at(-1).cells.push(cell);
      continue;
    }
    const unit = { cells: [cell], serves: computes(cell) ? messagesOf(cell) : null, message };
    while (unit.serves?.has(units.at(-1)?.message)) unit.cells.unshift(...units.pop().cells);
    units.push(unit);
  }
  return units;
}

/** The messages that an action may receive and send: of F, and of B, whole or for the input. */
function messagesOf(cell) {
  const parts = [...cell.matchAll(PARTS)].filter(([, , kind]) => kind !== "W" && kind !== "R");
  return new Set(parts.flatMap(([, stage, kind, microbatch]) => [
    ...["SEND", "RECV"].map((way) => `${way}_${stage}${kind === "F" ? "F" : "B"}${microbatch}`),
    ...(kind === "F" ? [`SEND_${stage}O${microbatch}`] : []),
  ]));
}

/** The place of a row's action in its rank's order. */
export function placeOf(picture, row) {
  const first = picture.lanes[picture.rows.rank[row]][0];
  return picture.rows.action[row] - picture.rows.action[first];
}

/** Before which action of its rank something stands that is dropped at a time. */
export function placeAt(picture, rank, time) {
  const rows = picture.lanes[rank];
  const first = picture.rows.action[rows[0]];
  let place = 0;
  for (const row of rows) {
    const parts = picture.rowsOf[picture.rows.action[row]];
    const middle = (picture.rows.start[parts[0]] + picture.rows.end[parts.at(-1)]) / 2;
    if (middle < time) place = picture.rows.action[row] - first + 1;
  }
  return place;
}

/** Where a text's cells begin and end: "row,column" -> [begin, end], counted from 1 as in messages. */
export function cellsOf(text) {
  const found = new Map();
  let at = 0;
  text.split("\n").forEach((line, row) => {
    let begin = at;
    line.split(",").forEach((cell, column) => {
      found.set(`${row + 1},${column + 1}`, [begin, begin + cell.length]);
      begin += cell.length + 1;
    });
    at += line.length + 1;
  });
  return found;
}
