// What moves in a page: tables that can be copied, charts in the page's colours, their values as tables.
(async () => {
  const copy = (table, button) => {
    // What is selected is copied as text and as a table; it needs no secure address, as the clipboard's own API does.
    const body = table.tBodies[0];
    getSelection().setBaseAndExtent(table.tHead, 0, body, body.childNodes.length);
    button.textContent = document.execCommand("copy") ? "Copied" : "Selected";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  };
  const add_button = (table, place) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Copy";
    button.setAttribute("aria-label", `Copy the table: ${table.getAttribute("aria-label")}`);
    button.addEventListener("click", () => copy(table, button));
    place.append(button);
  };
  document.querySelectorAll(".table").forEach(figure =>
    add_button(figure.querySelector("table"), figure.querySelector("figcaption")));

  const read = (chart, colours = {}) => JSON.parse(chart.querySelector("script").textContent,
    (key, value) => colours[value] ?? value);
  const shown = value => typeof value === "number" ? String(+value.toPrecision(6)) : value ?? "";
  const fill = (chart, place) => {
    const {data, layout} = read(chart);
    const sides = data.flatMap(trace => ["x", "y"].filter(side => trace[`error_${side}`]));
    const [side] = sides;
    const named = data.some(trace => trace.name), by_name = typeof data[0].y[0] === "string";
    const titles = [layout.xaxis.title.text, layout.yaxis.title.text || "name"];
    const heads = [...(named ? ["series"] : []), ...(by_name ? titles.reverse() : titles),
      ...(side ? ["low", "high"] : []), ...(data.some(trace => trace.base) ? ["from"] : [])];
    const rows = data.flatMap(trace => trace.x.map((x, k) => {
      const error = side && trace[`error_${side}`];
      const ends = side ? error ? [trace[side][k] - (error.arrayminus ?? error.array)[k],
        trace[side][k] + error.array[k]] : ["", ""] : [];
      const pair = [x, trace.text ? trace.text[k] : trace.y[k]];
      return [...(named ? [trace.meta ?? trace.name] : []), ...(by_name ? pair.reverse() : pair), ...ends,
        ...(trace.base ? [trace.base[k]] : [])];
    }));
    const card = document.createElement("div"), table = document.createElement("table");
    card.className = "card";
    card.tabIndex = 0;
    table.setAttribute("aria-label", chart.querySelector("h3").textContent);
    const line = (cells, tag, into) => cells.forEach((text, k) => {
      const cell = document.createElement(tag === "th" || k === 0 ? "th" : "td");
      cell.scope = tag === "th" ? "col" : "row";
      cell.textContent = shown(text);
      into.append(cell);
    });
    line(heads, "th", table.createTHead().insertRow());
    const body = table.createTBody();
    rows.forEach(row => line(row, "td", body.insertRow()));
    card.append(table);
    place.append(card);
    add_button(table, place);
  };
  document.querySelectorAll(".chart").forEach(chart => {
    const values = chart.querySelector(".values");
    values.addEventListener("toggle", () => values.querySelector("table") || fill(chart, values));
  });

  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), c => c.charCodeAt(0));
  const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(unpacked).text();
  document.head.append(script);

  const legend_rows = (data, width, scale) => {
    const names = data.filter(trace => trace.showlegend !== false).map(trace => trace.name);
    const widest = Math.max(...names.map(name => name.length)) * 6.6 * scale + 50;
    return Math.ceil(names.length / Math.max(Math.floor(width / widest), 1));
  };
  const draw = () => {
    const root = getComputedStyle(document.documentElement), scale = parseFloat(root.fontSize) / 16;
    const [ink, soft, grid, card] = ["--ink", "--soft", "--grid", "--card"].map(name => root.getPropertyValue(name).trim());
    // On a dark page the two blues of the palette change places: the lighter one stands out.
    const colours = matchMedia("(prefers-color-scheme: dark)").matches
      ? {"--ink": ink, "#0072B2": "#56B4E9", "#56B4E9": "#0072B2"} : {"--ink": ink};
    document.querySelectorAll(".chart").forEach(chart => {
      const {data, layout} = read(chart, colours), plot = chart.querySelector(".plot");
      const axis = given => ({gridcolor: grid, zerolinecolor: soft, zerolinewidth: 1, linecolor: grid,
        tickfont: {color: soft}, automargin: true, ...given,
        title: {...given.title, font: {color: soft, size: 12 * scale}, standoff: 8}});
      const rows = layout.showlegend ? legend_rows(data, plot.clientWidth, scale) : 0;
      plot.style.height = `${((layout.height ?? 270) + 20 * rows) * scale}px`;
      Plotly.react(plot, data, {...layout, height: undefined, paper_bgcolor: card, plot_bgcolor: card,
        font: {family: getComputedStyle(document.body).fontFamily, size: 12 * scale, color: ink},
        margin: {l: 48 * scale, r: 12 * scale, t: 10, b: 40 * scale},
        hoverlabel: {bgcolor: card, bordercolor: soft, font: {color: ink, size: 12 * scale}},
        legend: {orientation: "h", yref: "container", y: 0, yanchor: "bottom"},
        // A finger that passes over a chart scrolls the page.
        dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
        xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis)}, {displayModeBar: false, responsive: true});
    });
  };
  draw();
  ["(prefers-color-scheme: dark)", "(min-width: 1600px)"].forEach(query =>
    matchMedia(query).addEventListener("change", draw));
})();
