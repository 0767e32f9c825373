"use strict";
// Pages through the samples: chooses and orders them by the index, and unpacks the ones that are looked at.
for (const kind of ["error", "unhandledrejection"]) addEventListener(kind, (event) => {
  const line = document.createElement("p");
  line.className = "reason";
  const why = typeof DecompressionStream === "undefined"
    ? "this browser cannot unpack them; open the page in a newer one (Chrome 80, Firefox 113, Safari 16.4 or later)"
    : `${event.reason ?? event.message}; write the page again, or report this`;
  line.textContent = `The samples cannot be shown: ${why}.`;
  document.getElementById("samples").replaceChildren(line);
});
const index = JSON.parse(document.getElementById("index").textContent);
const samples = index.samples;
const byId = (id) => document.getElementById(id);
for (const sample of samples) sample.text = sample.text.toLowerCase();

function fill(id, options) {
  const select = byId(id);
  for (const [value, label] of options) select.add(new Option(label, value));
}
function counted(key, classes) {
  const counts = classes.map((_, at) => samples.filter((sample) => sample[key].includes(at)).length);
  return classes.map((name, at) => [name, `${name} (${counts[at].toLocaleString("en")})`]);
}
fill("fault", [["", "all samples"], ["none", "without a fault"], ["any", "with a fault"], ...counted("faults", index.faults)]);
fill("kind", [["", "all samples"], ...counted("kinds", index.kinds)]);
const orders = [["", "as in the file"], ["longest", "longest first"], ["shortest", "shortest first"]];
const beliefs = [["", "all samples"]];
const named = { sum: "a twin is likelier", "per token": "a twin is likelier a token", cosine: "a twin is nearer (cosine)" };
for (const measure of index.measures) {
  const number = samples.filter((sample) => sample.margins[measure] <= 0).length;
  beliefs.push([measure, `${named[measure]} (${number.toLocaleString("en")})`]);
  orders.push([measure, `smallest margin by ${measure} first`]);
}
if (index.measures.length) {
  beliefs.push(["none", "no twin is believed"], ["unknown", "no twin was scored"]);
  fill("believed", beliefs);
}
fill("sort", orders);
fill("per", [10, 20, 50, 100].map((number) => [String(number), String(number)]));

const controls = ["text", "fault", "kind", "believed", "sort", "per"].map(byId).filter(Boolean);
const initial = { per: "20" };
let page = 1;

function chosen() {
  const value = (id) => (byId(id) ? byId(id).value : "");
  const words = value("text").toLowerCase();
  const fault = value("fault"), kind = value("kind"), believed = value("believed"), sort = value("sort");
  const margins = (sample) => Object.values(sample.margins);
  const found = samples.map((_, at) => at).filter((at) => {
    const sample = samples[at];
    if (!sample.text.includes(words)) return false;
    if (fault === "none" ? sample.faults.length : fault === "any" ? !sample.faults.length
      : fault && !sample.faults.includes(index.faults.indexOf(fault))) return false;
    if (kind && !sample.kinds.includes(index.kinds.indexOf(kind))) return false;
    if (believed === "none") return margins(sample).length && margins(sample).every((margin) => margin > 0);
    if (believed === "unknown") return !margins(sample).length;
    return !believed || sample.margins[believed] <= 0;
  });
  const last = (at, key) => samples[at].margins[key] ?? Infinity;
  if (sort === "longest") found.sort((a, b) => samples[b].rows - samples[a].rows || a - b);
  else if (sort === "shortest") found.sort((a, b) => samples[a].rows - samples[b].rows || a - b);
  else if (sort) found.sort((a, b) => (last(a, sort) === last(b, sort) ? a - b : last(a, sort) - last(b, sort)));
  return found;
}

async function section(at) {
  const packed = Uint8Array.from(atob(byId(`s${at}`).textContent), (char) => char.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const template = document.createElement("template");
  template.innerHTML = await new Response(stream).text();  // every text in it is escaped
  return template.content;
}

let drawing = 0, drawn = 0;
async function draw() {
  const mine = ++drawing, found = chosen(), per = Number(byId("per").value);
  const pages = Math.max(1, Math.ceil(found.length / per));
  page = Math.min(Math.max(1, page), pages);
  const first = (page - 1) * per, here = found.slice(first, first + per);
  const count = (number) => number.toLocaleString("en");
  const range = here.length ? `${count(first + 1)}–${count(first + here.length)} of ${count(found.length)}` : "none";
  for (const pager of document.querySelectorAll(".pager")) {
    pager.querySelector(".back").disabled = page === 1;
    pager.querySelector(".on").disabled = page === pages;
    pager.querySelector(".page").value = page;
    pager.querySelector(".page").max = pages;
    pager.querySelector(".pages").textContent = count(pages);
    pager.querySelector(".shown").textContent =
      range + (found.length < samples.length ? `, chosen from ${count(samples.length)}` : "");
  }
  const state = new URLSearchParams();
  for (const control of controls) if (control.value !== (initial[control.id] ?? "")) state.set(control.id, control.value);
  if (page > 1) state.set("page", page);
  history.replaceState(null, "", `#${state}`);
  const sections = await Promise.all(here.map(section));
  if (mine !== drawing) return;  // something else was chosen meanwhile
  byId("samples").replaceChildren(...sections);
  drawn = mine;
}

function fromAddress() {
  const state = new URLSearchParams(location.hash.slice(1));
  for (const control of controls) {
    control.value = state.get(control.id) ?? initial[control.id] ?? "";
    if (control.selectedIndex === -1) control.value = initial[control.id] ?? "";  // no such option
  }
  page = Number(state.get("page")) || 1;
  draw();
}
function turn(to) {
  page = to;
  draw();
  if (scrollY > byId("samples").offsetTop) byId("samples").scrollIntoView();
}
for (const control of controls) control.addEventListener("input", () => turn(1));
for (const pager of document.querySelectorAll(".pager")) {
  pager.querySelector(".back").addEventListener("click", () => turn(page - 1));
  pager.querySelector(".on").addEventListener("click", () => turn(page + 1));
  pager.querySelector(".page").addEventListener("change", (event) => turn(Math.trunc(Number(event.target.value)) || 1));
}
addEventListener("hashchange", fromAddress);
fromAddress();
