"use strict";
// The page: sends an image, shows what comes back in tiles of its own server. Names of classes and files are only ever text.
const $ = (id) => document.getElementById(id);
const TILE = 256, ROWS = 1000;
let engines = [], result = null, viewer = null, mask = null, box = null;

function headers() {
  const token = $("token").value;
  return token ? { Authorization: `Bearer ${token}` } : {};
}

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").className = bad ? "error" : "";
}

async function ask(path, options = {}) {
  const reply = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  if (reply.status === 401) $("token-label").hidden = false;
  if (!reply.ok) {
    const said = await reply.json().catch(() => ({ error: { message: `status ${reply.status}` } }));
    throw new Error(said.error.message);
  }
  return reply;
}

function list(target, pairs) {
  target.replaceChildren(...pairs.flatMap(([name, value]) => {
    const dt = document.createElement("dt"), dd = document.createElement("dd");
    dt.textContent = name;
    dd.textContent = value;
    return [dt, dd];
  }));
}

async function loadEngines() {
  try {
    engines = await (await ask("v1/engines")).json();
  } catch (error) {
    return say(error.message, true);
  }
  $("engine").replaceChildren(...engines.map((engine) => new Option(engine.name)));
  showEngine();
}

function showEngine() {
  const engine = engines.find((each) => each.name === $("engine").value);
  if (!engine) return;
  const proof = engine.parity;
  list($("about"), [["runs in", engine.library], ["precision", engine.precision], ["device", engine.device],
    ["tile", engine.tile.join(" × ") + " px"], ["tiles", engine.exact ? "exact: no seams" : "blended"],
    ["parity", proof ? (proof.accepted === false ? "not accepted" : "recorded, see the record") : "none recorded"]]);
  $("record").textContent = JSON.stringify(engine, null, 1);
}

async function predict(file) {
  if (!file) return;
  say(`${file.name}: computing …`);
  const name = encodeURIComponent($("engine").value);
  try {
    const reply = await ask(`v1/predict/${name}?format=view`, { method: "POST", body: file });
    result = await reply.json();
  } catch (error) {
    return say(error.message, true);
  }
  show(file.name);
}

function source(picture, query = "") {
  const [height, width] = result.shape, top = result.levels - 1, key = result.view;
  return { width, height, tileSize: TILE, minLevel: 0, maxLevel: top,
    getTileUrl: (level, x, y) => `v1/views/${key}/${picture}/${top - level}/${x}_${y}.png${query}` };
}

function show(name) {
  if (viewer) viewer.destroy();
  box = mask = null;
  viewer = OpenSeadragon({ element: $("viewer"), drawer: "canvas", showNavigationControl: false, showNavigator: true,
    imageSmoothingEnabled: false, maxZoomPixelRatio: 32, animationTime: 0.3, loadTilesWithAjax: true,
    ajaxHeaders: headers(), gestureSettingsMouse: { clickToZoom: false } });
  viewer.addHandler("canvas-click", (event) => event.quick && pick(viewer.viewport.pointFromPixel(event.position)));
  viewer.addTiledImage({ tileSource: source("image"), success: drawMask });
  $("result").hidden = false;
  showClasses();
  showObjects();
  const run = result.report;
  list($("run"), [["image", run.reading], ["tiles", String(run.tiles)], ["seconds", run.seconds.toFixed(2)],
    ["Mpx/s", run.mpx_per_s.toFixed(1)], ["ran on", `${run.backend} ${run.precision}, ${run.device}`],
    ...Object.entries(run.class_share).map(([label, share]) => [label, `${(100 * share).toFixed(2)} %`])]);
  say(`${name}: ${result.shape[1]} × ${result.shape[0]} px, ${result.objects.length} objects`);
}

function drawMask() {
  const labels = [...document.querySelectorAll("#classes input:checked")].map((input) => input.value).join(",");
  const old = mask;
  viewer.addTiledImage({ tileSource: source("mask", `?labels=${labels}`), opacity: $("opacity").value / 100,
    success: (event) => { mask = event.item; if (old) viewer.world.removeItem(old); } });
}

function showClasses() {
  const labels = Object.entries(result.classes).filter(([label]) => label !== "0");
  $("classes").replaceChildren(...labels.map(([label, name]) => {
    const line = document.createElement("label"), input = document.createElement("input");
    const swatch = document.createElement("span");
    input.type = "checkbox";
    input.checked = true;
    input.value = label;
    input.addEventListener("change", drawMask);
    swatch.className = "swatch";
    swatch.style.background = `rgb(${result.colours[label].join(",")})`;
    line.append(input, swatch, ` ${name} `);
    return line;
  }));
}

function showObjects() {
  const all = result.objects, rows = all.slice(0, ROWS);
  $("count").textContent = all.length > ROWS ? `${all.length}, the first ${ROWS} listed` : String(all.length);
  $("objects").replaceChildren(...rows.map((object) => {
    const row = document.createElement("tr"), [y, x] = object.centroid;
    row.id = `object-${object.id}`;
    for (const value of [object.id, object.class, object.area_px, x.toFixed(0), y.toFixed(0)]) {
      row.insertCell().textContent = value;
    }
    row.addEventListener("click", () => select(object, true));
    return row;
  }));
}

function select(object, zoom) {
  document.querySelectorAll("tr.selected").forEach((row) => row.classList.remove("selected"));
  const row = $(`object-${object.id}`);
  if (row) {
    row.classList.add("selected");
    if (!zoom) row.scrollIntoView({ block: "nearest" });
  }
  const [top, left, bottom, right] = object.box, width = right - left, height = bottom - top;
  const place = (margin) => shown().imageToViewportRectangle(
    left - margin, top - margin, width + 2 * margin, height + 2 * margin);
  if (box) viewer.removeOverlay(box);
  box = document.createElement("div");
  box.className = "box";
  box.dataset.object = object.id;
  viewer.addOverlay({ element: box, location: place(1) });
  if (zoom) viewer.viewport.fitBounds(place(2 * Math.max(width, height)));
}

function shown() {
  return viewer.world.getItemAt(0);
}

function pick(point) {
  const at = shown().viewportToImageCoordinates(point);
  const area = ({ box: [top, left, bottom, right] }) => (bottom - top) * (right - left);
  const inside = result.objects.filter(({ box: [top, left, bottom, right] }) =>
    at.x >= left && at.x < right && at.y >= top && at.y < bottom);
  if (inside.length) select(inside.reduce((a, b) => (area(a) <= area(b) ? a : b)), false);
}

async function save(name) {
  try {
    const blob = await (await ask(`v1/views/${result.view}/${name}`)).blob();
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  } catch (error) {
    say(error.message, true);
  }
}

document.addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("over"); });
document.addEventListener("dragleave", () => document.body.classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  predict(event.dataTransfer.files[0]);
});
$("file").addEventListener("change", (event) => predict(event.target.files[0]));
$("engine").addEventListener("change", showEngine);
$("token").addEventListener("change", loadEngines);
$("opacity").addEventListener("input", () => mask && mask.setOpacity($("opacity").value / 100));
$("pixels").addEventListener("click", () => viewer.viewport.zoomTo(shown().imageToViewportZoom(8)));
$("whole").addEventListener("click", () => viewer.viewport.goHome());
$("save-mask").addEventListener("click", () => save("mask.png"));
$("save-outlines").addEventListener("click", () => save("objects.geojson"));
loadEngines();
