// Layout: where everything stands, in CSS pixels, and what stands at a point.

const HEADING = 30;
const AXIS = 26;
const BETWEEN = 22;

/**
 * views: [{ key, title, note, tracks: [Picture, ...], editable, bad: Set of "row,column" }].
 * A view is a block of lanes, one for each rank; its tracks share each lane, one below the other.
 */
export class Layout {
  constructor(views, { width, from, to, strips }) {
    const lanes = views.reduce((sum, view) => sum + view.tracks[0].ranks, 0);
    const most = Math.max(...views.map((view) => view.tracks[0].ranks), 0);
    this.narrow = width < 560;
    this.left = this.narrow ? 22 + 6 * String(Math.max(most - 1, 0)).length : 64;
    this.right = width - (this.narrow ? 6 : 14);
    this.bar = lanes <= 20 ? 24 : lanes <= 40 ? 18 : 13;
    if (views.some((view) => view.tracks.length > 1)) this.bar = Math.round(this.bar * 1.4);
    this.strip = strips ? (lanes <= 20 ? 20 : lanes <= 40 ? 15 : 10) : 0;
    this.gap = strips ? 8 : lanes <= 20 ? 5 : 3;
    this.longest = Math.max(...views.flatMap((view) => view.tracks.map((picture) => picture.longest)), 0) || 1;
    this.from = from ?? 0;
    this.to = to ?? this.longest * 1.005;
    this.width = width;
    let y = AXIS;
    this.blocks = views.map((view, index) => {
      if (index) y += BETWEEN;
      const block = { ...view, index, top: y };
      y += HEADING;
      block.lanes = view.tracks[0].lanes.map((_, rank) => {
        const height = this.bar / view.tracks.length;
        const tracks = view.tracks.map((picture, each) => ({ picture, y: y + each * height, height }));
        const lane = { rank, y, tracks, stripTop: y + this.bar + 2 };
        y += this.bar + (this.strip ? this.strip + 2 : 0) + this.gap;
        return lane;
      });
      block.bottom = y - this.gap;
      return block;
    });
    this.bottom = y;
    this.height = y + AXIS;
    this.axis = AXIS;
  }

  x(time) {
    return this.left + ((time - this.from) / (this.to - this.from)) * (this.right - this.left);
  }

  time(x) {
    return this.from + ((x - this.left) / (this.right - this.left)) * (this.to - this.from);
  }

  /** The block, lane, track and row or idle span at a point; null where there is nothing. */
  hit(x, y) {
    if (x < this.left || x > this.right) return null;
    const block = this.blocks.find((each) => each.top <= y && y <= each.bottom + this.gap);
    const lane = block?.lanes.find((each) => each.y <= y && y < each.y + this.bar + this.strip + 2);
    if (!lane) return null;
    const track = Math.min(Math.floor((y - lane.y) / (this.bar / block.tracks.length)), block.tracks.length - 1);
    const picture = block.tracks[track];
    const time = this.time(x);
    const reach = (this.to - this.from) / (this.right - this.left); // bars of less than a pixel are found too
    let row = picture.rowAtTime(lane.rank, time);
    if (row < 0) row = picture.rowAtTime(lane.rank, time + reach);
    const idle = row < 0 ? picture.idleAtTime(lane.rank, time) : -1;
    return row < 0 && idle < 0 ? null : { block, lane, track, picture, row, idle, rank: lane.rank };
  }

  /** The rectangle of a row, or of an idle span. */
  rectangle(block, track, row, idle = -1) {
    const picture = block.tracks[track];
    const [rank, begin, end] = row >= 0
      ? [picture.rows.rank[row], picture.rows.start[row], picture.rows.end[row]]
      : [picture.idle.rank[idle], picture.idle.begin[idle], picture.idle.end[idle]];
    const place = block.lanes[rank].tracks[track];
    return { x: this.x(begin), y: place.y, width: this.x(end) - this.x(begin), height: place.height };
  }
}
