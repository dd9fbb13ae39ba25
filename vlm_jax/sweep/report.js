"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const chart = document.getElementById("chart");
  const [task, axis, shown] = ["task", "axis", "shown"].map((id) => document.getElementById(id));
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  // Plotly reads a few HTML tags in its texts; names and labels are to be shown as they are.
  const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const hover = (point) => [`<b>${plain(point.label)}</b>`, ...point.details.map(plain)].join("<br>");

  function connectorTrace(name, style) {
    const drawn = data.points
      .filter((p) => p.connector === name && task.value in p.accuracy && p.drawn_costs[axis.value] !== null)
      .sort((a, b) => a.drawn_costs[axis.value] - b.drawn_costs[axis.value]);
    const shares = drawn.map((p) => p.accuracy[task.value]);
    return {
      name: plain(name) + (style.control ? " (control)" : ""),
      mode: "lines+markers",
      x: drawn.map((p) => p.drawn_costs[axis.value]),
      y: shares.map((s) => s.mean),
      error_y: {
        type: "data", symmetric: false, thickness: 1.2, width: 4,
        array: shares.map((s) => s.high - s.mean),
        arrayminus: shares.map((s) => s.mean - s.low),
      },
      line: { color: style.color, width: 1.8, dash: style.dashed ? "dash" : "solid" },
      marker: { symbol: style.symbol, size: 9 },
      customdata: drawn.map((p) => p.label),
      text: drawn.map(hover),
      hovertemplate: "%{text}<extra></extra>",
    };
  }

  // Every seed's own accuracy, as a small dot on the point's interval.
  function seedTrace(name, style) {
    const dots = data.points
      .filter((p) => p.connector === name && task.value in p.accuracy && p.drawn_costs[axis.value] !== null)
      .flatMap((p) => Object.entries(p.accuracy[task.value].seeds).map(([seed, share]) => ({ p, seed, share })));
    return {
      name: plain(name), mode: "markers", showlegend: false,
      x: dots.map((d) => d.p.drawn_costs[axis.value]),
      y: dots.map((d) => d.share),
      marker: { color: style.color, size: 4, opacity: 0.6 },
      customdata: dots.map((d) => d.p.label),
      text: dots.map((d) => `${plain(d.p.label)}, seed ${d.seed}: ${(100 * d.share).toFixed(1)}%`),
      hovertemplate: "%{text}<extra></extra>",
    };
  }

  function frontTraces(ink) {
    const front = data.fronts[task.value][axis.value].map((index) => data.points[index]);
    const x = front.map((p) => p.drawn_costs[axis.value]);
    const y = front.map((p) => p.accuracy[task.value].mean);
    const band = { color: dark.matches ? "#6b5716" : "#ffdf80", width: 9, shape: "hv" };
    const ring = { symbol: "circle-open", size: 19, color: ink, line: { width: 1.6 } };
    return [
      { name: "Pareto front", legendgroup: "front", mode: "lines", x, y, line: band, hoverinfo: "skip" },
      { legendgroup: "front", mode: "markers", x, y, marker: ring, hoverinfo: "skip", showlegend: false },
    ];
  }

  function draw() {
    const css = getComputedStyle(document.documentElement);
    const [ink, line, paper] = ["--ink", "--line", "--paper"].map((name) => css.getPropertyValue(name).trim());
    const { title, scale, ticks } = data.axes[axis.value];
    const [band, rings] = frontTraces(ink);
    const styles = Object.entries(data.styles);
    const dots = data.several_seeds ? styles.map(([name, style]) => seedTrace(name, style)) : [];
    const traces = [band, ...styles.map(([name, style]) => connectorTrace(name, style)), ...dots, rings];
    const horizontal = { title: { text: title }, type: scale, gridcolor: line, linecolor: ink, zeroline: false };
    if (ticks) Object.assign(horizontal, { tickmode: "array", tickvals: ticks, ticktext: ticks.map(String) });
    Plotly.react(chart, traces, {
      xaxis: horizontal,
      yaxis: { title: { text: "accuracy, " + plain(task.value) }, tickformat: ".0%", gridcolor: line, linecolor: ink, zeroline: false },
      font: { color: ink, size: 14 },
      paper_bgcolor: paper, plot_bgcolor: paper,
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
      hoverlabel: { align: "left", bgcolor: paper, font: { color: ink } },
      hovermode: "closest",
      margin: { l: 70, r: 20, t: 20, b: 60 },
    }, {
      responsive: true, displaylogo: false, displayModeBar: chart.clientWidth < 700 ? false : "hover",
      modeBarButtonsToRemove: ["select2d", "lasso2d"],
      showSendToCloud: false, plotlyServerURL: "", // results stay in this file
    });
  }

  function showAnswers() {
    for (const part of document.querySelectorAll("#examples [data-label]")) {
      part.toggleAttribute("hidden", part.dataset.label !== shown.value);
    }
    for (const article of document.querySelectorAll("#examples article")) {
      const answered = article.querySelector("dd[data-label]:not([hidden])") !== null;
      article.querySelector(".unanswered").toggleAttribute("hidden", answered);
    }
  }

  function sortBy(header) {
    const column = header.cellIndex;
    const descending = header.getAttribute("aria-sort") === "ascending";
    for (const other of header.parentNode.querySelectorAll("[aria-sort]")) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const body = header.closest("table").tBodies[0];
    const key = (row) => row.cells[column].dataset.sort;
    const compare = (a, b) => (column === 0 ? a.localeCompare(b, "en", { numeric: true }) : a - b);
    const rows = [...body.rows].sort((a, b) => {
      if (key(a) === "" || key(b) === "") return (key(a) === "") - (key(b) === ""); // the empty ones last
      return compare(key(a), key(b)) * (descending ? -1 : 1);
    });
    body.append(...rows);
  }

  async function copy(button) {
    const code = button.nextElementSibling;
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      window.getSelection().selectAllChildren(code); // where a page may not write the clipboard
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  }

  for (const select of [task, axis]) select.addEventListener("change", draw);
  dark.addEventListener("change", draw);
  for (const header of document.querySelectorAll("th[aria-sort]")) {
    header.firstElementChild.addEventListener("click", () => sortBy(header));
  }
  for (const button of document.querySelectorAll(".copy")) button.addEventListener("click", () => copy(button));
  draw();
  if (shown) {
    shown.addEventListener("change", showAnswers);
    showAnswers();
    chart.on("plotly_click", (event) => {
      const label = event.points[0].customdata;
      if ([...shown.options].some((option) => option.value === label)) {
        shown.value = label;
        showAnswers();
      }
    });
  }
})();
