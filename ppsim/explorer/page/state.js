// State: everything that the page shows, and its form in the address. What stands at its default is left out.

export const DEFAULTS = Object.freeze({
  schedule: "1f1b", ranks: "4", microbatches: "8", stages: "",
  csv: "",                                            // an order of one's own, instead of these four
  copies: "",                                         // of the model, if its stages are of several
  forward: "10", input: "10", weight: "10", full: "", // ms of a microbatch on a rank; full: B, else I + W
  activations: "64", kept: "32", message: "8",        // MiB
  latency: "10", bandwidth: "25",                     // µs, GB/s
  limit: "",                                          // MiB on a rank
  recompute: "", offload: "", hostBandwidth: "25",    // % of the microbatches, GB/s
  replicas: "1", parameters: "256", ring: "25", whole: "", // MiB on a rank, GB/s, stages
  second: "zb-h1", secondStages: "",
  run: "", overlay: true,
  colours: "kind", path: false, memory: true, messages: false,
  from: "", to: "",                                   // the part of the time axis that is shown, in seconds
  at: "",                                             // the action that is marked: block and row
});

const LIMIT = 1 << 24; // characters of an order, once unpacked

/** The state that an address holds. */
export async function fromAddress(address) {
  const given = new URLSearchParams(address.replace(/^#/, ""));
  const state = { ...DEFAULTS };
  for (const [name, value] of Object.entries(DEFAULTS)) {
    if (!given.has(name)) continue;
    state[name] = typeof value === "boolean" ? given.get(name) === "1" : given.get(name);
  }
  if (state.csv) state.csv = await unpack(state.csv);
  return state;
}

/** The address of a state. */
export async function toAddress(state) {
  const given = new URLSearchParams();
  for (const [name, value] of Object.entries(DEFAULTS)) {
    if (state[name] === value) continue;
    const text = name === "csv" ? await pack(state.csv) : state[name];
    given.set(name, typeof value === "boolean" ? (text ? "1" : "0") : text);
  }
  const text = given.toString();
  return text ? `#${text}` : "#";
}

async function through(stream, bytes) {
  const packed = new Response(new Blob([bytes]).stream().pipeThrough(stream));
  return new Uint8Array(await packed.arrayBuffer());
}

async function pack(text) {
  const bytes = await through(new CompressionStream("deflate-raw"), new TextEncoder().encode(text));
  let letters = "";
  for (const byte of bytes) letters += String.fromCharCode(byte);
  return btoa(letters).replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "");
}

async function unpack(text) {
  try {
    const letters = atob(text.replaceAll("-", "+").replaceAll("_", "/"));
    const stream = new Blob([Uint8Array.from(letters, (each) => each.charCodeAt(0))]).stream();
    const reader = stream.pipeThrough(new DecompressionStream("deflate-raw")).getReader();
    const decoder = new TextDecoder();
    let found = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return found + decoder.decode();
      found += decoder.decode(value, { stream: true });
      if (found.length > LIMIT) throw new Error("too long");
    }
  } catch {
    return "this address holds no order that can be read";
  }
}

const numbers = (text) => text.split(/[\s,;]+/).filter(Boolean).map((each) => Number(each));
const seconds = (text) => numbers(text).map((each) => each / 1e3);
const whole = (text) => (text.trim() === "" ? null : Number(text));
const rate = (text) => (text.trim() === "" ? null : Number(text) * 1e9);
const MIB = 2 ** 20;

/** What the server is asked about a state; `second` asks for the schedule to compare with. */
export function question(state, second = false) {
  const own = second || !state.csv
    ? {
        schedule: second ? state.second : state.schedule,
        ranks: whole(state.ranks),
        microbatches: whole(state.microbatches),
        stages_per_rank: whole(second ? state.secondStages : state.stages),
        recompute: whole(state.recompute) / 100,
        offload: whole(state.offload) / 100,
        whole_stages: whole(state.whole),
      }
    : { csv: state.csv, copies: whole(state.copies) ?? 1 };
  return {
    ...own,
    forward_s: seconds(state.forward),
    backward_input_s: seconds(state.input),
    backward_weight_s: seconds(state.weight),
    backward_s: seconds(state.full),
    activation_bytes: Math.round(whole(state.activations) * MIB),
    weight_activation_bytes: Math.round(whole(state.kept) * MIB),
    output_bytes: Math.round(whole(state.message) * MIB),
    latency_s: whole(state.latency) / 1e6,
    bytes_per_s: rate(state.bandwidth),
    host_bytes_per_s: rate(state.hostBandwidth),
    replicas: whole(state.replicas) ?? 1,
    parameter_bytes: Math.round(whole(state.parameters) * MIB),
    replica_bytes_per_s: rate(state.ring),
    run: second || !state.run ? null : state.run,
  };
}

/** The part of a state that is an order of one's own, of so many copies of the model; no order if it is empty. */
export const ownOrder = (csv, copies) => ({ csv, copies: csv && copies > 1 ? String(copies) : "" });

/** The limit in bytes, or null. */
export function limitBytes(state) {
  const limit = Number(state.limit);
  return state.limit.trim() && limit > 0 ? limit * MIB : null;
}

/** Which field of the page a field of a question stands in. */
export const FIELDS = {
  schedule: "schedule", ranks: "ranks", microbatches: "microbatches", stages_per_rank: "stages",
  forward_s: "forward", backward_input_s: "input", backward_weight_s: "weight", backward_s: "full",
  activation_bytes: "activations", weight_activation_bytes: "kept", output_bytes: "message",
  latency_s: "latency", bytes_per_s: "bandwidth", csv: "csv", copies: "csv", run: "run",
  recompute: "recompute", offload: "offload", host_bytes_per_s: "hostBandwidth", replicas: "replicas",
  parameter_bytes: "parameters", replica_bytes_per_s: "ring", whole_stages: "whole",
};
