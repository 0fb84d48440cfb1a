"use strict";

const drawn = [];

/* Draw a figure, given as plotly's JSON, in the element with that id. */
function draw(id, figure, config) {
  drawn.push(id);
  Plotly.newPlot(id, figure.data, figure.layout, config).then(numberCells);
}

/* Paper is narrower than most windows: figures take its width while printing, and the window's again afterwards. */
const PAPER_PX = 690;
addEventListener("beforeprint", () => drawn.forEach((id) => Plotly.relayout(id, { autosize: false, width: PAPER_PX })));
addEventListener("afterprint", () => drawn.forEach((id) => Plotly.relayout(id, { autosize: true, width: null })));
