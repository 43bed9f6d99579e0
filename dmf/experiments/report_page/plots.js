// The plots of the page: curves by uPlot, and parallel coordinates as SVG.
"use strict";

const PANEL_HEIGHT = 260;
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// --- Lines ---

// The exponential moving average of values, without the bias of its start.
function smoothed(values, weight) {
  let mean = 0, total = 0;
  return values.map(value => {
    mean = weight * mean + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return mean / total;
  });
}

// The value of a line at x, linear between its points; null outside of them.
function valueAt({x, y}, at) {
  if (at < x[0] || at > x.at(-1)) return null;
  const i = x.findIndex(one => one >= at);
  return x[i] === at ? y[i] : y[i - 1] + (y[i] - y[i - 1]) * (at - x[i - 1]) / (x[i] - x[i - 1]);
}

// The mean of lines with a band from the smallest to the largest, at the points of the first.
function meanLine(lines) {
  const mean = {x: [], y: [], low: [], high: []};
  for (const at of lines[0].x) {
    const values = lines.map(line => valueAt(line, at));
    if (values.includes(null)) continue;
    mean.x.push(at);
    mean.y.push(values.reduce((a, b) => a + b) / values.length);
    mean.low.push(Math.min(...values));
    mean.high.push(Math.max(...values));
  }
  return mean;
}

// The lines of a panel for each group of runs that is shown.
function groupLines(lineOf) {
  return groupsShown().flatMap(group => {
    const lines = group.filter(isShown).map(lineOf).filter(line => line && line.x.length);
    if (!lines.length) return [];
    const line = lines.length === 1 ? lines[0] : meanLine(lines);
    return [{...line, run: group[0], name: groupName(group)}];
  });
}

// --- A panel ---

function isLog(lines, choice) {
  const values = lines.flatMap(({y}) => y);
  if (choice !== "auto") return choice === "log";
  const low = values.reduce((a, b) => Math.min(a, b), Infinity);
  const high = values.reduce((a, b) => Math.max(a, b), -Infinity);
  return low > 0 && high > 10 * low;
}

// uPlot's series and aligned data: each line, and the edges of its band.
function seriesOf(lines) {
  const series = [{}], tables = [], bands = [];
  for (const {run, name, x, y, low, high} of lines) {
    series.push({label: name, stroke: color(run), dash: dash(run), width: 1.5, spanGaps: true,
                 points: {show: x.length <= 12, size: 5, fill: color(run)}});
    tables.push([x, y]);
    if (!low) continue;
    for (const [edge, y] of [["highest", high], ["lowest", low]]) {
      series.push({label: `${name}, ${edge}`, stroke: "transparent", spanGaps: true,
                   points: {show: false}});
      tables.push([x, y]);
    }
    bands.push({series: [series.length - 2, series.length - 1], fill: color(run) + "33"});
  }
  return {series, bands, data: uPlot.join(tables)};
}

// Shows the name and the values of the point nearest to the pointer.
function showTip(plot, xTitle) {
  const i = plot.nearest, tip = byId("tip"), at = i ? plot.cursor.idxs[i] : null;
  const inside = at !== null && at !== undefined && plot.over.matches(":hover");
  tip.style.display = inside ? "block" : "none";
  if (!inside) return;
  tip.textContent = `${plot.series[i].label}\n${xTitle} ${short(plot.data[0][at])}: ` +
    `${short(plot.data[i][at])}`;
  const box = plot.over.getBoundingClientRect();
  const left = box.left + plot.cursor.left + 14, width = tip.offsetWidth;
  tip.style.left = `${Math.max(4, Math.min(left, innerWidth - width - 8))}px`;
  tip.style.top = `${box.top + plot.cursor.top + 14}px`;
}

function panelOptions(width, {series, bands}, {xTitle, logX, logY, ticks, sync}) {
  const axis = {stroke: css("--text"), grid: {stroke: css("--line"), width: 1},
                ticks: {stroke: css("--line"), width: 1}};
  const values = (_, splits) => splits.map(short);
  return {
    width, height: PANEL_HEIGHT, series, bands,
    legend: {show: false},
    scales: {x: {time: false, distr: logX ? 3 : 1, log: ticks ? 2 : 10}, y: {distr: logY ? 3 : 1}},
    axes: [{...axis, label: xTitle, labelSize: 18, size: 34, labelFont: "12px system-ui", values,
            ...(ticks ? {splits: () => ticks} : {})},
           {...axis, size: 62, ...(logY ? {} : {values})}],
    focus: {alpha: 0.3},
    cursor: {focus: {prox: 30}, hover: {skip: [null, undefined]}, points: {one: true},
             ...(sync ? {sync: {key: sync}} : {})},
    hooks: {
      setSeries: [(plot, i) => { plot.nearest = i; }],
      setCursor: [plot => showTip(plot, xTitle)],
    },
  };
}

// Adds a panel with lines {run, name, x, y, low, high}; where an axis is logarithmic, values that
// are not positive are left out.
function addPanel(container, {title, protocol}, lines, options) {
  const logY = isLog(lines, options.y);
  const kept = lines.map(line => {
    const use = line.x.map((x, i) =>
      (!options.logX || x > 0) && (!logY || (line.y[i] > 0 && (!line.low || line.low[i] > 0))));
    const filtered = {...line};
    for (const part of ["x", "y", "low", "high"]) {
      if (line[part]) filtered[part] = line[part].filter((_, i) => use[i]);
    }
    return filtered;
  }).filter(line => line.x.length);
  if (!kept.length) return;
  const heading = element("h3", {}, title);
  if (protocol) heading.append(element("small", {}, protocol));
  const panel = element("div", {className: "panel"}, heading);
  container.append(panel);
  const parts = seriesOf(kept);
  new uPlot(panelOptions(panel.clientWidth, parts, {...options, logY}), parts.data, panel);
}

// --- Curves and scores ---

const isUsual = ({title, protocol}) =>
  protocol || ["loss", "gradient_norm"].includes(title) || title.endsWith("_error");

function drawMetricChoices() {
  DATA.curves.forEach((curve, i) => {
    if (isUsual(curve)) state.metrics.add(i);
    const box = element("input", {type: "checkbox", checked: state.metrics.has(i)});
    box.onchange = () => {
      if (box.checked) state.metrics.add(i); else state.metrics.delete(i);
      drawCurves();
    };
    byId("metrics").append(element("label", {title: curve.protocol}, box, ` ${curve.title}`));
  });
}

function drawCurves() {
  const hours = byId("x").value === "hours", weight = Number(byId("smoothing").value);
  byId("smoothing-value").textContent = weight;
  const container = byId("curves");
  container.replaceChildren();
  const options = {xTitle: hours ? "hours" : "step", logX: checked("log-x"), y: byId("y").value,
                   sync: "training"};
  DATA.curves.forEach((curve, i) => {
    if (!state.metrics.has(i)) return;
    const lines = groupLines(run => {
      if (!curve.lines[run]) return null;
      let [x, y] = curve.lines[run];
      y = smoothed(y, weight);
      if (!hours) return {x, y};
      const times = DATA.runs[run].hours, known = x.map(step => step in times);
      return {x: x.filter((_, i) => known[i]).map(step => times[step]),
              y: y.filter((_, i) => known[i])};
    });
    addPanel(container, curve, lines, options);
  });
}

function drawScores() {
  const container = byId("scores");
  container.replaceChildren();
  for (const panel of DATA.scores) {
    const lines = checked("mean") ? scoreMeans(panel) : panel.lines.filter(({run}) => isShown(run));
    const ticks = [...new Set(lines.flatMap(({x}) => x))].sort((a, b) => a - b);
    addPanel(container, panel, lines, {xTitle: "sampling steps", logX: true, y: "auto", ticks});
  }
}

// The lines of a panel of scores, averaged over seeds where EMA and guidance are the same.
function scoreMeans({lines}) {
  const suffixes = [...new Set(lines.map(({suffix}) => suffix))];
  return suffixes.flatMap(suffix => groupLines(
    run => lines.find(line => line.run === run && line.suffix === suffix)
  ).map(line => ({...line, name: line.name + suffix})));
}

// --- Parallel coordinates ---

// The place of each value on an axis, from 0 (bottom) to 1, and the labels of the axis.
function axisOf(title, values) {
  const given = values.filter(value => value !== null && value !== undefined);
  if (given.length && given.every(isNumber)) {
    const low = Math.min(...given), high = Math.max(...given);
    const scale = low > 0 && high >= 10 * low ? Math.log : value => value;
    const place = value => high === low ? 0.5 : (scale(value) - scale(low)) / (scale(high) - scale(low));
    const middle = scale === Math.log ? Math.sqrt(low * high) : (low + high) / 2;
    const distinct = [...new Set(given)];
    const labels = distinct.length <= 6 ? distinct : [low, middle, high];
    return {title, places: values.map(v => isNumber(v) ? place(v) : null),
            labels: labels.map(value => [short(value), place(value)])};
  }
  const distinct = [...new Set(given)].sort(compare), count = Math.max(distinct.length - 1, 1);
  const place = value => distinct.length === 1 ? 0.5 : distinct.indexOf(value) / count;
  return {title, places: values.map(v => given.includes(v) ? place(v) : null),
          labels: distinct.map(value => [value === "" ? "(empty)" : short(value), place(value)])};
}

function svg(tag, attributes, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  Object.entries(attributes).forEach(([name, value]) => node.setAttribute(name, value));
  node.textContent = text;
  return node;
}

// A text of at most so many characters: paths and names often differ at their end alone.
function cut(text, length) {
  if (text.length <= length) return text;
  const head = Math.floor(length / 3);
  return `${text.slice(0, head)}…${text.slice(head + 1 - length)}`;
}

function drawParallel() {
  const {columns, rows} = DATA.table, container = byId("parallel");
  container.replaceChildren();
  const axes = shownFields().map(i => axisOf(columns[i], rows.map(row => row[i])));
  if (measure()) axes.push(axisOf(measure().title, measure().values));
  if (axes.length < 2) return;
  const height = 260, top = 44, bottom = height - 16;
  const step = Math.max(120, Math.min(220, (container.clientWidth - 130) / (axes.length - 1)));
  const width = 20 + step * (axes.length - 1) + 110;
  const x = i => 20 + i * step, y = place => bottom - place * (bottom - top);
  const root = svg("svg", {width, height, role: "img"});
  rows.forEach((_, run) => {
    if (!isShown(run)) return;
    const points = axes.flatMap(({places}, i) =>
      places[run] === null ? [] : [`${x(i)} ${y(places[run])}`]);
    const path = svg("path", {d: `M${points.join("L")}`, stroke: color(run),
                              "stroke-dasharray": dash(run).join(" "),
                              class: run === bestRun() ? "best" : ""});
    path.append(svg("title", {}, DATA.runs[run].name));
    if (points.length > 1) root.append(path);
  });
  axes.forEach(({title, labels}, i) => {
    root.append(svg("line", {x1: x(i), x2: x(i), y1: top, y2: bottom}));
    const [name, rest] = [title.split(/, | \[/)[0], title.split(/, /).slice(1, 2).join("")];
    const most = Math.floor(step / 7.5);
    const shown = name.length > most ? `…${name.slice(1 - most)}` : name;
    const head = svg("text", {x: x(i) - 10, y: 14, "font-weight": "bold"}, shown);
    head.append(svg("title", {}, title));
    root.append(head, svg("text", {x: x(i) - 10, y: 28}, rest));
    labels.forEach(([text, place]) => {
      const label = svg("text", {x: x(i) + 5, y: y(place) + 4}, cut(text, 16));
      label.append(svg("title", {}, text));
      root.append(label);
    });
  });
  container.append(root);
}
