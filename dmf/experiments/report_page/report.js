// Draws the page of `dmf report` from the JSON in it: legend, table, parallel coordinates, samples.
// The plots are in plots.js, which precedes it in the page.
"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const COLORS = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd",
                "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"];
const DASHES = [[], [6, 3], [2, 3], [8, 3, 2, 3]];
const FIELDS_SHOWN = 6, CELL_LENGTH = 60;
const state = {hidden: new Set(), sort: 0, descending: false, metrics: new Set()};

const byId = id => document.getElementById(id);
const color = run => COLORS[run % COLORS.length];
const dash = run => DASHES[Math.floor(run / COLORS.length) % DASHES.length];
const isNumber = value => typeof value === "number";
const isShown = run => !state.hidden.has(run);
const checked = id => byId(id).checked;

// A new element with a text or with children.
function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  Object.assign(node, attributes);
  node.append(...children.filter(child => child !== null));
  return node;
}

// A number with at most 4 significant digits; whole numbers and texts as they are.
function short(value) {
  if (!isNumber(value)) return value === null || value === undefined ? "" : String(value);
  return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(4)));
}

// A name or a path as parts between which a line may break.
function breakable(text) {
  return text.split(/(?<=[_./,=])/).flatMap((part, i) => i ? [element("wbr"), part] : [part]);
}

// --- Measures: number columns of the table and the last values of all curves ---

function measures() {
  const {columns, rows, higher, fields} = DATA.table;
  const found = columns.map((title, i) => ({title, values: rows.map(row => row[i]),
                                            higher: Boolean(higher[title]), column: i}))
    .filter(m => m.column > fields && m.title in higher);
  const titles = new Set(found.map(m => m.title));
  for (const {title, protocol, higher, lines} of DATA.curves) {
    if (titles.has(title)) continue;
    const values = rows.map((_, run) => lines[run] ? lines[run][1].at(-1) : null);
    found.push({title: `${title}, last ${protocol}`.trim(), values, higher, column: -1});
  }
  return found.filter(m => m.values.some(isNumber));
}

const MEASURES = measures();
const measure = () => MEASURES[byId("measure").value];

function bestRun() {
  if (!measure()) return -1;
  const sign = Number(byId("direction").value), values = measure().values;
  return values.reduce((best, value, run) =>
    isNumber(value) && isShown(run) && (best < 0 || sign * value < sign * values[best]) ? run : best,
    -1);
}

// --- Fields and groups of seeds ---

// The columns of config fields that the table shows. Of many fields it shows those that all runs
// have, one of those that differ between the same runs, and those with the most values first.
function shownFields() {
  const {rows, fields} = DATA.table;
  const all = Array.from({length: fields}, (_, i) => i + 1);
  if (fields <= FIELDS_SHOWN || checked("all-fields")) return all;
  const seen = new Set();
  const apart = all.map(i => {
    const values = rows.map(row => row[i]), distinct = [...new Set(values)];
    return {i, count: distinct.length, common: !distinct.includes("unset"),
            key: values.map(value => distinct.indexOf(value)).join()};
  }).sort((a, b) => b.common - a.common || b.count - a.count || a.i - b.i)
    .filter(({key}) => !seen.has(key) && seen.add(key));
  return apart.slice(0, FIELDS_SHOWN).map(({i}) => i).sort((a, b) => a - b);
}

// Runs whose configs differ in the seed alone; the number of the seed in a path, as in
// runs/seed_0/flow, does not count.
function seedGroups() {
  const {columns, rows, fields} = DATA.table, seed = columns.indexOf("seed"), groups = new Map();
  rows.forEach((row, run) => {
    const others = row.slice(1, fields + 1).filter((_, i) => i + 1 !== seed);
    const key = seed < 0 || row[seed] === null ? run :
      JSON.stringify(others).replace(/(seed[_=-]?)\d+/g, "$1");
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(run);
  });
  return [...groups.values()];
}

const GROUPS = seedGroups();
const groupsShown = () => checked("mean") ? GROUPS : DATA.runs.map((_, run) => [run]);

function groupName(group) {
  const name = DATA.runs[group[0]].name;
  if (group.length === 1) return name;
  const others = name.replace(/(^|[,/])seed[_=-]?\d+(?=[,/]|$)/, "").replace(/^[,/]/, "");
  return [others, `mean of ${group.length} seeds`].filter(Boolean).join(", ");
}

// --- Legend ---

function drawLegend() {
  byId("legend").replaceChildren(...groupsShown().map(group => {
    const swatch = element("span", {className: "swatch"});
    swatch.style.borderColor = color(group[0]);
    swatch.style.borderTopStyle = ["solid", "dashed", "dotted", "double"][
      Math.floor(group[0] / COLORS.length) % DASHES.length];
    const name = groupName(group);
    const button = element("button", {title: name, className: group.some(isShown) ? "" : "off"},
                           swatch, name);
    button.onclick = () => { toggle(group, group.some(isShown)); };
    button.ondblclick = () => { hideAll(); toggle(group, false); };
    return button;
  }));
}

function toggle(group, hide) {
  group.forEach(run => hide ? state.hidden.add(run) : state.hidden.delete(run));
  draw();
}

function hideAll() { DATA.runs.forEach((_, run) => state.hidden.add(run)); }

// --- Table ---

function compare(a, b) {
  if (isNumber(a) && isNumber(b)) return a - b;
  if (isNumber(a) !== isNumber(b)) return isNumber(a) ? -1 : 1;
  return String(a).localeCompare(String(b), "en", {numeric: true});
}

// Rows by the column that was clicked, empty cells last; column 0 keeps the order of the runs.
function sortedRuns() {
  const {rows} = DATA.table, sign = state.descending ? -1 : 1, empty = v => v === null;
  return rows.map((_, run) => run).sort((a, b) => {
    const [x, y] = [rows[a][state.sort], rows[b][state.sort]];
    if (state.sort === 0) return sign * (a - b);
    return empty(x) - empty(y) || sign * compare(x, y) || a - b;
  });
}

function heading(column) {
  const [first, protocol] = DATA.table.columns[column].split(" [");
  const [name, ...rest] = first.split(", ");
  const cell = element("th", {title: DATA.table.columns[column]}, ...breakable(name));
  if (rest.length) cell.append(element("small", {}, rest.join(", ")));
  if (protocol && DATA.protocols.length > 1) cell.append(element("small", {}, `[${protocol}`));
  if (column === state.sort) cell.ariaSort = state.descending ? "descending" : "ascending";
  cell.onclick = () => {
    state.descending = column === state.sort && !state.descending;
    state.sort = column;
    drawTable();
  };
  return cell;
}

function nameCell(run) {
  const {name, links} = DATA.runs[run], files = element("small");
  for (const [title, href] of Object.entries(links)) {
    files.append(element("a", {href, textContent: title}), " ");
  }
  return element("td", {title: name}, ...breakable(name), files);
}

function tableCell(run, column) {
  if (column === 0) return nameCell(run);
  const value = DATA.table.rows[run][column], title = DATA.table.columns[column];
  const className = title === "status" ? value : title === "note" ? "text" :
    isNumber(value) ? "number" : "";
  const parts = typeof value !== "string" ? [short(value)] :
    title === "note" ? [value] : breakable(cut(value, CELL_LENGTH));
  return element("td", {className, title: value === null ? "" : String(value)}, ...parts);
}

function drawTable() {
  const {columns, fields} = DATA.table, best = bestRun();
  const shown = [0, ...shownFields(), ...[...columns.keys()].filter(i => i > fields)];
  byId("table").replaceChildren(
    element("thead", {}, element("tr", {}, ...shown.map(heading))),
    element("tbody", {}, ...sortedRuns().map(run => element(
      "tr", {className: `${run === best ? "best" : ""} ${isShown(run) ? "" : "off"}`},
      ...shown.map(column => tableCell(run, column))))));
  byId("best").textContent = best < 0 ? "" :
    `${DATA.runs[best].name}: ${short(measure().values[best])}`;
}

// --- Samples ---

function drawSamples() {
  byId("samples").replaceChildren(...DATA.runs.flatMap(({name, grid, grid_step, links}, run) =>
    grid && isShown(run) ? [element("figure", {},
      element("img", {src: grid, alt: name}),
      element("figcaption", {}, `${name}, after step ${grid_step} `,
              links.grid ? element("a", {href: links.grid}, "full grid") : null))] : []));
}

// --- The page ---

// Says so where a part of the page is empty.
function sayIfEmpty(id, text) {
  if (!byId(id).childNodes.length) byId(id).append(element("p", {className: "note"}, text));
}

function draw() {
  drawLegend();
  drawTable();
  drawParallel();
  drawCurves();
  drawScores();
  drawSamples();
  sayIfEmpty("parallel", "No config field differs.");
  ["curves", "scores", "samples"].forEach(id => sayIfEmpty(id, "Nothing yet."));
}

function start() {
  MEASURES.forEach(({title}, i) => byId("measure").append(element("option", {value: i}, title)));
  const choose = () => {
    if (measure()) byId("direction").value = measure().higher ? -1 : 1;
    draw();
  };
  byId("all").onclick = () => { state.hidden.clear(); draw(); };
  byId("none").onclick = () => { hideAll(); draw(); };
  for (const id of ["mean", "direction", "all-fields"]) byId(id).onchange = draw;
  for (const id of ["x", "y", "log-x"]) byId(id).onchange = drawCurves;
  byId("smoothing").oninput = drawCurves;
  byId("measure").onchange = choose;
  byId("mean").parentNode.hidden = GROUPS.length === DATA.runs.length;
  byId("x").parentNode.hidden = !DATA.runs.some(run => Object.keys(run.hours).length);
  byId("all-fields-label").hidden = shownFields().length === DATA.table.fields;
  byId("all-fields-label").lastElementChild.textContent =
    `all ${DATA.table.fields} fields that differ`;
  byId("protocol").textContent = DATA.protocols.length === 1 ?
    `All evaluations: ${DATA.protocols[0]}.` : "";
  byId("thinned").textContent = DATA.thinned ?
    "Long curves are drawn by the smallest and largest value of each stretch; metrics.csv has all." :
    "";
  drawMetricChoices();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  let timer = 0;
  window.addEventListener("resize", () => {
    clearTimeout(timer);
    timer = setTimeout(draw, 200);
  });
  choose();
}

start();
