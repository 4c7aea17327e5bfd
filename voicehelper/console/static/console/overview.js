// Keeps the overview fresh without reload. What comes is a whole new overview; the page is changed into it node by node,
// so that focus, scrolled boxes, opened tables and charts stay what they are.
const OVERVIEW_MS = 5000;
const OVERVIEW_TIMEOUT_MS = 10000;
const charts = new Map();

function morph(from, to) {
  if (from.nodeType !== to.nodeType || from.nodeName !== to.nodeName || from.id !== to.id) return from.replaceWith(to);
  if (from.nodeType !== Node.ELEMENT_NODE) {
    if (from.nodeValue !== to.nodeValue) from.nodeValue = to.nodeValue;
    return undefined;
  }
  if (from.dataset.keep !== to.dataset.keep) return from.replaceWith(to);
  if (from.dataset.keep) return undefined;
  for (const { name, value } of to.attributes) {
    if (from.getAttribute(name) !== value) from.setAttribute(name, value);
  }
  for (const { name } of [...from.attributes]) {
    if (!to.hasAttribute(name) && !(name === "open" && from.nodeName === "DETAILS")) from.removeAttribute(name);
  }
  const [old, wanted] = [[...from.childNodes], [...to.childNodes]];
  wanted.forEach((node, i) => (i < old.length ? morph(old[i], node) : from.append(node)));
  old.slice(wanted.length).forEach((node) => node.remove());
  return undefined;
}

// --- Charts ---

const time = (seconds) => new Date(seconds * 1000).toISOString().slice(11, 16);
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const percent = new Intl.NumberFormat("en", { style: "percent", maximumFractionDigits: 2 });
const milliseconds = (seconds) => (seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(1)} s`);

function colours() {
  const style = getComputedStyle(document.getElementById("overview"));
  return (name) => style.getPropertyValue(`--ov-${name}`).trim();
}

// Of each chart: how its lines are drawn and their values written.
const KINDS = {
  publishing: [{ type: "bar", write: compact.format, axis: "y" }, { type: "line", write: percent.format, axis: "share" }],
  emitted: [{ type: "bar", write: compact.format, axis: "y" }],
  "http-rate": [{ type: "line", write: compact.format, axis: "y" }],
  "http-p95": [{ type: "line", write: milliseconds, axis: "y" }],
};

function dataset(line, kind, number, colour) {
  const stroke = colour(`series-${number + 1}`);
  return {
    type: kind.type,
    label: line.label,
    data: line.values,
    yAxisID: kind.axis,
    borderColor: stroke,
    backgroundColor: kind.type === "bar" ? stroke : colour("fill"),
    fill: kind.type === "line" && number === 0,
    borderWidth: kind.type === "bar" ? 0 : 2,
    borderRadius: 2,
    spanGaps: false,
    tension: 0.25,
    // A value between two gaps is no line: it is a point.
    pointRadius: line.values.map((value, i, all) => (value !== null && (all[i - 1] ?? null) === null && (all[i + 1] ?? null) === null ? 2.5 : 0)),
    pointHitRadius: 8,
    order: number === 0 ? 1 : 0,
  };
}

function axes(kinds, colour) {
  const scale = (kind, position) => ({
    position,
    beginAtZero: true,
    grid: { color: colour("gridline"), drawTicks: false, drawOnChartArea: position === "left" },
    border: { display: false },
    ticks: { color: colour("axis"), maxTicksLimit: 5, padding: 6, callback: (value) => kind.write(value) },
    ...(kind.axis === "share" ? { suggestedMax: 0.01 } : {}),
  });
  const scales = {
    x: { grid: { display: false }, border: { display: false }, ticks: { color: colour("axis"), maxTicksLimit: 7, maxRotation: 0, autoSkip: true } },
  };
  for (const kind of kinds) scales[kind.axis] = scale(kind, kind.axis === "y" ? "left" : "right");
  return scales;
}

function draw(figure) {
  const canvas = figure.querySelector("canvas");
  const kinds = KINDS[figure.dataset.chartName];
  const { times, lines } = JSON.parse(figure.dataset.chart);
  const colour = colours();
  const drawn = kinds.slice(0, lines.length);
  const data = { labels: times.map(time), datasets: lines.map((line, i) => dataset(line, drawn[i], i, colour)) };
  canvas.setAttribute("aria-label", figure.dataset.summary);
  const known = charts.get(canvas);
  if (known) {
    known.data.labels = data.labels;
    data.datasets.forEach((fresh, i) => Object.assign((known.data.datasets[i] ??= {}), fresh));
    known.data.datasets.length = data.datasets.length;
    known.options.scales = axes(drawn, colour);
    known.update("none");
    return;
  }
  const options = {
    animation: false,
    maintainAspectRatio: false,
    interaction: { mode: "index", intersect: false },
    plugins: {
      legend: { display: false },
      tooltip: { callbacks: { label: (item) => `${item.dataset.label}: ${kinds[item.datasetIndex].write(item.raw)}` } },
    },
    scales: axes(drawn, colour),
  };
  charts.set(canvas, new Chart(canvas, { type: "bar", data, options }));
}

function drawAll() {
  for (const [canvas, chart] of charts) {
    if (!canvas.isConnected) {
      chart.destroy();
      charts.delete(canvas);
    }
  }
  for (const figure of document.querySelectorAll("#overview [data-chart]")) {
    if (figure.querySelector("canvas")) draw(figure);
  }
}

// --- Refreshing ---

const words = () => document.getElementById("state-words")?.textContent.trim() ?? "";
// Without figures that count up: "for 12 s" is no news.
const gist = () => `${document.getElementById("state-line")?.dataset.level ?? ""} ${words().replace(/[\d.,]+/g, "")}`;

function sayStale(why) {
  const stale = document.getElementById("stale");
  const since = document.querySelector("#updated time")?.textContent ?? "this page was opened";
  const text = `Not updated since ${since}: ${why}.`;
  if (stale.textContent !== text) {
    if (stale.hidden) document.getElementById("announcer").textContent = text;
    stale.textContent = text;
  }
  stale.hidden = false;
  document.body.classList.add("ov-is-stale");
}

let freshAt = Date.now();

function sayFresh() {
  freshAt = Date.now();
  document.getElementById("stale").hidden = true;
  document.body.classList.remove("ov-is-stale");
}

async function refresh() {
  const overview = document.getElementById("overview");
  let response;
  try {
    response = await fetch(overview.dataset.url, { redirect: "manual", cache: "no-store", signal: AbortSignal.timeout(OVERVIEW_TIMEOUT_MS) });
  } catch (error) {
    return sayStale(error.name === "TimeoutError" ? "the server takes too long" : "the server does not answer");
  }
  if (response.type === "opaqueredirect" || response.status === 403) return sayStale("you are logged out; reload the page to log in");
  if (!response.ok) return sayStale(`the server answers with error ${response.status}`);
  let text;
  try {
    text = await response.text();
  } catch {
    return sayStale("the server's answer broke off");
  }
  const before = gist();
  const fresh = overview.cloneNode(false);
  fresh.append(...new DOMParser().parseFromString(text, "text/html").body.childNodes);
  morph(overview, fresh);
  sayFresh();
  drawAll();
  if (gist() !== before) document.getElementById("announcer").textContent = words();
  return undefined;
}

let timer = null;
let isRefreshing = false;

async function keepFresh() {
  clearTimeout(timer);
  if (document.hidden || isRefreshing) return;
  isRefreshing = true;
  // Hidden since yesterday, or the machine slept: "Healthy" was then.
  if (Date.now() - freshAt > 3 * OVERVIEW_MS) sayStale("asking anew");
  try {
    await refresh();
  } finally {
    isRefreshing = false;
    if (!document.hidden) timer = setTimeout(keepFresh, OVERVIEW_MS);
  }
}

Chart.defaults.font.family = "Inter, sans-serif";
drawAll();
new MutationObserver(drawAll).observe(document.documentElement, { attributes: true, attributeFilter: ["class"] });
document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : keepFresh()));
timer = setTimeout(keepFresh, OVERVIEW_MS);
