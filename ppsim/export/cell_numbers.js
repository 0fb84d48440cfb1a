/* Lanes of cells show their numbers once the cells in sight have room for them. */
const CELL_PX = 24;

function numberCells(plot) {
  const lanes = plot.data.flatMap((each, index) => (each.type === "heatmap" && each.text ? [index] : []));
  if (!lanes.length) return;
  let isShown = false;
  const update = () => {
    const [from, to] = plot.layout.xaxis.range;
    const count = ({ x, text }) => text[0].filter((each, cell) => each && x[cell + 1] > from && x[cell] < to).length;
    const isWide = plot.clientWidth / Math.max(...lanes.map((index) => count(plot.data[index]))) > CELL_PX;
    if (isWide === isShown) return;
    isShown = isWide;
    Plotly.restyle(plot, { texttemplate: isWide ? "%{text}" : "" }, lanes);
  };
  plot.on("plotly_relayout", update);
  update();
}
