// Card: what is said of the action or the idle span under the pointer.

import { make, swatch } from "./elements.js";
import { bytesText, timeText } from "./units.js";

const KIND_WORDS = {
  F: "forward", B: "full backward", I: "backward for the input", W: "backward for the weights",
  R: "recomputed forward",
};
const PART_WORDS = {
  warm_up: ["warm-up", "the pipeline fills"],
  drain: ["drain", "the pipeline empties"],
  imbalance: ["imbalance", "another rank's computation takes longer, or the order does not suit the stages"],
  messages: ["messages", "one is queued or under way, or made its sender late"],
  streams: ["streams", "a message waits for others on its communicator, or for its receive to be posted"],
  collectives: ["gathering parameters", "the stage's parameters are not whole yet, here or further up"],
  copies: ["loading activations", "they are still coming back from host memory, here or further up"],
  device: ["device or dispatch", "inputs are there, yet the action does not start, here or further up"],
  straggler: ["straggler", "an action took longer than usual, here or further up"],
};

export const partName = (part) => PART_WORDS[part][0];

/** The card's content for what is marked. */
export function cardOf(marked, choices) {
  return marked.row >= 0 ? ofAction(marked) : ofIdle(marked, choices);
}

function ofAction({ picture, row, block }) {
  const { start, end, stage, microbatch, rank, held, slack } = picture.rows;
  const pair = picture.inPair(row) ? ", half of an overlapped pair" : "";
  const lines = [
    make("h3", {}, `${picture.spell(row)} on rank ${rank[row]}`),
    make("p", { class: "quiet" },
      `${KIND_WORDS[picture.letter[row]]} of microbatch ${microbatch[row]} on stage ${stage[row]}${pair}`),
    make("p", {}, `Starts at ${timeText(start[row])}, takes ${timeText(end[row] - start[row])}.`),
  ];
  if (!picture.messages) {
    const bad = (block.problems ?? []).filter((each) => each.rows.includes(row));
    return [...lines, ...bad.map((each) => make("p", { class: "bad" }, each.message))];
  }
  const waited = picture.waitedFor(row);
  lines.push(make("h4", {}, "Waited for"));
  if (!waited.length) lines.push(make("p", {}, "nothing: it is first on its rank."));
  else lines.push(make("ul", {}, ...waited.map((each, index) => make("li", {}, waitText(picture, row, each, index, waited.length)))));
  const takers = picture.takers[row].map((each) => takerText(picture, row, each));
  const next = picture.next(row);
  if (next >= 0 && !picture.takers[row].includes(next)) takers.unshift(`${picture.spell(next)}, next on this rank`);
  lines.push(make("h4", {}, "Waits for it"));
  lines.push(takers.length ? make("ul", {}, ...takers.map((each) => make("li", {}, each))) : make("p", {}, "nothing."));
  const room = slack[row] > 1e-9 * picture.numbers.makespan
    ? `It could end ${timeText(slack[row])} later without a longer step.`
    : "On a critical path: if it ended later, so would the step.";
  const [out, back] = ["O", "L"].map((kind) => picture.besideAt.get(`${stage[row]}${kind}${microbatch[row]}`));
  if (picture.letter[row] === "F" && out !== undefined) {
    const { start: from, end: to } = picture.beside;
    lines.push(make("p", {},
      `Its activations go to host memory from ${timeText(from[out])} to ${timeText(to[out])}, and come back from ${timeText(from[back])} to ${timeText(to[back])}.`));
  }
  const holds = held ? ` The rank then holds ${bytesText(held[row])} of activations.` : "";
  lines.push(make("p", { class: "foot" }, `${room}${holds}`));
  return lines;
}

function waitText(picture, row, { row: other, there, message, beside }, index, count) {
  const last = index === 0 && count > 1 ? " (the last)" : "";
  if (other < 0) {
    const what = picture.beside.kind[beside] === "L" ? "activations, back from host memory" : "parameters, gathered";
    return `${picture.beside.name[beside]}: its ${what} at ${timeText(there)}${last}`;
  }
  const name = picture.spell(other);
  if (other === picture.previous(row)) return `${name} before it on this rank, done at ${timeText(there)}${last}`;
  if (message < 0) return `${name} on this rank, done at ${timeText(there)}${last}`;
  const took = there - picture.rows.end[other];
  return `${name} on rank ${picture.rows.rank[other]}: its message came at ${timeText(there)}, ${timeText(took)} after it${last}`;
}

function takerText(picture, row, other) {
  const [mine, its] = [picture.rows.rank[row], picture.rows.rank[other]];
  return mine === its ? `${picture.spell(other)} on this rank` : `${picture.spell(other)} on rank ${its}`;
}

function ofIdle({ picture, idle }, choices) {
  const { rank, action, begin, end, parts } = picture.idle;
  const next = action[idle] >= 0 ? picture.rowsOf[action[idle]][0] : -1;
  const lines = [
    make("h3", {}, `Rank ${rank[idle]} is idle for ${timeText(end[idle] - begin[idle])}`),
    make("p", { class: "quiet" },
      `${timeText(begin[idle])} to ${timeText(end[idle])}, ${next >= 0 ? `before ${picture.spell(next)}` : "after its last action"}`),
  ];
  const found = Object.entries(parts)
    .map(([part, seconds]) => [part, seconds[idle]])
    .filter(([, seconds]) => seconds > 1e-9 * picture.numbers.makespan)
    .sort((a, b) => b[1] - a[1]);
  lines.push(make("h4", {}, "Why"));
  lines.push(make("ul", { class: "parts" }, ...found.map(([part, seconds]) =>
    make("li", {}, swatch(choices.parts[part]),
      make("span", {}, make("b", {}, `${partName(part)} ${timeText(seconds)}`), `: ${PART_WORDS[part][1]}`)))));
  if (next >= 0) {
    const chain = picture.chain(next, begin[idle]);
    if (chain.length) {
      const [first, ...more] = chain;
      const arrived = first.message >= 0 ? `, whose message came at ${timeText(first.there)}` : "";
      let text = `It waits for ${picture.spell(first.row)} on rank ${picture.rows.rank[first.row]}${arrived}.`;
      if (more.length) {
        const shown = more.slice(0, 4).map((each) => `${picture.spell(each.row)} on rank ${picture.rows.rank[each.row]}`);
        text += ` That waited for ${shown.join(", for ")}${more.length > 4 ? " and so on" : ""}.`;
      }
      lines.push(make("p", { class: "foot" }, text));
    }
  } else {
    lines.push(make("p", { class: "foot" }, "Its work is done; other ranks still compute."));
  }
  return lines;
}
