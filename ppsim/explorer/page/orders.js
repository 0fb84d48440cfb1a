// Orders: a schedule's text as lists of actions, and a change of one of them.

/** The actions of each rank; a row and a column of the text are a rank and a place. */
export function ordersOf(csv) {
  return csv.replace(/\n$/, "").split("\n").map((row) => row.split(",").map((cell) => cell.trim()).filter(Boolean));
}

export const textOf = (orders) => `${orders.map((actions) => actions.join(",")).join("\n")}\n`;

/** The text with an action moved to another place in its rank's order. `to` counts before the action is taken out. */
export function moved(csv, rank, from, to) {
  const orders = ordersOf(csv);
  const [action] = orders[rank].splice(from, 1);
  orders[rank].splice(to > from ? to - 1 : to, 0, action);
  return textOf(orders);
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
